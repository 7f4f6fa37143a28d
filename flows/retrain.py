"""The retraining flow: does the same as `train` if there is a reason to train."""

from prefect import flow

from flows.pipeline import train_and_release
from flows.summary import Summary
from tasks.config.run import RunConfig


@flow(name="retrain", flow_run_name="{config.dataset} {config.model}", persist_result=False)
def retrain_flow(config: RunConfig, force: bool = False, refresh: frozenset[str] = frozenset()) -> Summary:
    """Retrains a model if data, code, configuration or lock file have changed since its champion.

    If nothing has changed, the flow run completes in the state Skipped; if a gate refuses, in the state Refused.

    Args:
        config: the configuration of the run.
        force: train although nothing has changed.
        refresh: steps (`download`, `preprocess`) to repeat although their output exists.
    """
    # Prefect turns the returned state into its summary.
    return train_and_release(config, refresh, only_if_changed=True, force=force)  # type: ignore[return-value]
