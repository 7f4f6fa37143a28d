"""The retraining flow: what `train` does, if there is a reason for it."""

from prefect import flow

from flows.pipeline import train_and_release
from flows.summary import Summary
from tasks.config.run import RunConfig


@flow(name="retrain", flow_run_name="{config.dataset} {config.model}", persist_result=False)
def retrain_flow(config: RunConfig, force: bool = False, refresh: frozenset[str] = frozenset()) -> Summary:
    """Retrain a model if data, code, configuration or lock file have changed since its champion.

    If nothing has, the flow run ends as completed, in a state called Skipped, and says so; a gate that refuses ends it
    in one called Refused.

    Args:
        config: what to train on, and how.
        force: train although nothing has changed.
        refresh: steps (`download`, `preprocess`) to do anew although their output exists.
    """
    return train_and_release(config, refresh, only_if_changed=True, force=force)  # type: ignore[return-value]  # likewise
