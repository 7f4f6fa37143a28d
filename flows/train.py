"""The training flow: download, preprocess, data gate, train, evaluate, register, serving and quality gate, release."""

from prefect import flow

from flows.pipeline import train_and_release
from flows.summary import Summary
from tasks.config.run import RunConfig


@flow(name="train", flow_run_name="{config.dataset} {config.model}", persist_result=False)
def train_flow(config: RunConfig, refresh: frozenset[str] = frozenset(), resume: str | None = None) -> Summary:
    """Trains a network on a dataset, registers it, and releases it if it passes its gates.

    A refusal by a gate is no failure: the flow run completes in the state Refused.

    Args:
        config: the configuration of the run.
        refresh: steps (`download`, `preprocess`) to repeat although their output exists.
        resume: id of the MLflow run of an unfinished training to continue.
    """
    # Prefect turns the returned state into its summary.
    return train_and_release(config, refresh, resume)  # type: ignore[return-value]
