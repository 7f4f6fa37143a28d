"""The list of trainings, for people who look for one to resume."""

from datetime import datetime

from infra.errors import UsageError
from infra.records import Record
from infra.storage.object_store import open_bucket
from infra.tracking import mlflow_runs
from infra.tracking.tags import MANIFEST_DIGEST
from tasks.training.checkpoints import commits_of
from tasks.training.runs.run_record import read_record

SPARE = 100  # runs that are looked at in place of those that are left out


class Training(Record):
    """One training, as a list shows it."""

    run_id: str
    started: datetime
    status: str
    """MLflow's: RUNNING, FINISHED, FAILED, KILLED."""

    step: int | None
    """Of the newest checkpoint."""

    dataset: str
    model: str
    val_accuracy: float | None

    def cells(self) -> list[str]:
        """As texts, in the order of the fields."""
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
    """The newest trainings, the newest first; without those that ended before they began, or are not of our kind."""
    store = open_bucket(create=True)
    found: list[Training] = []
    for run in mlflow_runs.search_runs(MANIFEST_DIGEST, limit=limit + SPARE):
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
