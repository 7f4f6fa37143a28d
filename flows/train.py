"""The training flow: download, preprocess, data gate, train, evaluate, register, serving and quality gate, release."""

from typing import Annotated

from prefect import flow
from pydantic.json_schema import SkipJsonSchema

from flows.run_names import training_name
from flows.summary import Summary
from tasks.config.form import Form
from tasks.config.run import RunConfig, Step
from tasks.orchestration.failure import failure_told


@flow(name="train", flow_run_name=training_name, persist_result=False)
def train_flow(
    config: Annotated[RunConfig, Form()],
    refresh: frozenset[Step] = frozenset(),
    resume: Annotated[str | None, SkipJsonSchema()] = None,
) -> Summary:
    """Trains a network on a dataset, registers it, and releases it if it passes its gates.

    Args:
        config: What to train, on what, and when to release it. Fields that are left alone keep their defaults.
        refresh: Steps to repeat although their output exists.
        resume: Id of the MLflow run of an unfinished training to continue, with the same configuration; not shown.

    Raises:
        Refused: a gate refused; the flow run ends in the state Refused, of Prefect's type failed.
    """
    with failure_told(minor=False):  # code that cannot be loaded, too; not above, since a deployment does not need it
        from flows.pipeline import train_and_release

    # Prefect turns the returned state into its summary.
    return train_and_release(config, refresh, resume)  # type: ignore[return-value]
