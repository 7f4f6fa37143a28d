"""The training flow: download, preprocess, check, train, evaluate, register, try, judge, release."""

from prefect import flow

from flows.pipeline import train_and_release
from flows.summary import Summary
from tasks.config.run import RunConfig


@flow(name="train", flow_run_name="{config.dataset} {config.model}", persist_result=False)
def train_flow(config: RunConfig, refresh: frozenset[str] = frozenset(), resume: str | None = None) -> Summary:
    """Train a network on a dataset, register it, and release it if it passes its gates.

    A gate that refuses is no failure: the flow run ends as completed, in a state called Refused.

    Args:
        config: what to train on, and how.
        refresh: steps (`download`, `preprocess`) to do anew although their output exists.
        resume: id of the MLflow run of an earlier, unfinished training to go on with.
    """
    return train_and_release(config, refresh, resume)  # type: ignore[return-value]  # Prefect makes a summary of a state
