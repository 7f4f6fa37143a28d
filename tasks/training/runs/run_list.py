"""Lists trainings, for people who want to resume one."""

from datetime import datetime

from infra.errors import UsageError
from infra.records import Record
from infra.storage.object_store import open_bucket
from infra.tracking import mlflow_runs
from infra.tracking.tags import MANIFEST_DIGEST
from tasks.training.checkpoints import commits_of
from tasks.training.runs.run_record import read_record

EXTRA_RUNS_SEARCHED = 100  # in place of runs that the list leaves out


class Training(Record):
    """A training in the list."""

    run_id: str
    started: datetime
    status: str
    """MLflow's status: RUNNING, FINISHED, FAILED or KILLED."""

    step: int | None
    """Step of the newest checkpoint."""

    dataset: str
    model: str
    val_accuracy: float | None

    def cells(self) -> list[str]:
        """Returns the fields as texts, in their order."""
        return [
            self.run_id,
            f"{self.started.astimezone():%Y-%m-%d %H:%M}",
            self.status,
            "" if self.step is None else str(self.step),
            self.dataset,
            self.model,
            "" if self.val_accuracy is None else f"{self.val_accuracy:.2%}",
        ]


def list_trainings(limit: int) -> list[Training]:
    """Returns the newest trainings, newest first; leaves out runs without a readable record."""
    store = open_bucket(create=True)
    found: list[Training] = []
    for run in mlflow_runs.search_runs(MANIFEST_DIGEST, limit=limit + EXTRA_RUNS_SEARCHED):
        if len(found) == limit:
            break
        try:
            config = read_record(run.run_id).config
        except UsageError:
            continue
        newest = next(commits_of(store, run.run_id), None)
        found.append(
            Training(
                run_id=run.run_id,
                started=run.started,
                status=run.status,
                step=newest and newest.step,
                dataset=config.dataset,
                model=config.name or config.dataset,
                val_accuracy=run.metrics.get("val/accuracy"),
            )
        )
    return found
