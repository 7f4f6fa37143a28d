"""The retraining flow: does the same as `train` if there is a reason to train."""

from typing import Annotated

from prefect import flow
from pydantic.json_schema import SkipJsonSchema

from flows.run_names import training_name
from flows.summary import Summary
from tasks.config.form import Form
from tasks.config.run import RunConfig, Step
from tasks.orchestration.failure import failure_told


@flow(name="retrain", flow_run_name=training_name, persist_result=False)
def retrain_flow(
    config: Annotated[RunConfig, Form()],
    force: bool = False,
    refresh: frozenset[Step] = frozenset(),
    resume: Annotated[str | None, SkipJsonSchema()] = None,
) -> Summary:
    """Retrains a model if data, code, configuration or lock file have changed since its champion.

    If nothing has changed, the flow run completes in the state Skipped.

    Args:
        config: What to train, on what, and when to release it. Fields that are left alone keep their defaults.
        force: Train although nothing has changed.
        refresh: Steps to repeat although their output exists.
        resume: Id of the MLflow run of an unfinished training to continue, with the same configuration; not shown.

    Raises:
        Refused: a gate refused; the flow run ends in the state Refused, of Prefect's type failed.
    """
    with failure_told(minor=False):  # code that cannot be loaded, too; not above, since a deployment does not need it
        from flows.pipeline import train_and_release

    # Prefect turns the returned state into its summary.
    return train_and_release(config, refresh, resume, only_if_changed=True, force=force)  # type: ignore[return-value]
