"""Tries the code of a commit before it is merged: `trial` runs it up to the evaluation, and the installed code judges.

The flows `trial` and `judge` have work pools, and thereby credentials, of their own.
"""

from typing import Annotated

from prefect import flow
from pydantic.json_schema import SkipJsonSchema

from flows.run_names import training_name
from flows.summary import Summary
from tasks.config.form import Form
from tasks.config.run import RunConfig
from tasks.orchestration.failure import failure_told


@flow(name="trial", flow_run_name=training_name, persist_result=False)
def trial_flow(config: Annotated[RunConfig, Form()], resume: Annotated[str | None, SkipJsonSchema()] = None) -> Summary:
    """Trains and evaluates in the experiment `NAME trials`; registers and promotes nothing.

    Args:
        config: What to train, and on what. Fields that are left alone keep their defaults.
        resume: Id of the MLflow run of an unfinished trial to continue, with the same configuration; not shown.
    """
    with failure_told(minor=True):  # code that cannot be loaded, too; not above, since a deployment does not need it
        from flows.pipeline import train_and_release

    # Prefect turns the returned state into its summary.
    return train_and_release(config, frozenset(), resume, trial=True)  # type: ignore[return-value]


@flow(name="judge", flow_run_name=training_name, persist_result=False)
def judge_flow(config: Annotated[RunConfig, Form()], run: str) -> Summary:
    """Judges a trial against the champion as if it were a new version; registers and promotes nothing.

    Args:
        config: The model's configuration, of which name, gate and slices count.
        run: Id of the trial's MLflow run.

    Raises:
        Refused: the gate would refuse it; the flow run ends in the state Refused, of Prefect's type failed.
    """
    with failure_told(minor=True):  # code that cannot be loaded, too; not above, since a deployment does not need it
        from flows.pipeline import judge_trial

    return judge_trial(config, run)  # type: ignore[return-value]
