"""Lists trainings, for people who want to resume one."""

from contextlib import suppress
from datetime import datetime

from infra.errors import UsageError
from infra.machine.threads import in_parallel
from infra.records import Record
from infra.storage import bucket_layout
from infra.storage.object_store import ObjectStore, open_bucket
from infra.tracking import mlflow_runs
from infra.tracking.model_registry import RegisteredVersion, search_versions
from infra.tracking.tags import MANIFEST_DIGEST, MODEL, VersionRecord
from tasks.training.checkpoints import commits_of
from tasks.training.protocol.job import Outcome
from tasks.training.runs.run_record import read_record

IDS_PER_REQUEST = 100
"""Runs whose versions one request asks for: their ids stand in its address, which servers limit to 8 KB."""


class Training(Record):
    """A training in the list."""

    run_id: str
    started: datetime
    status: str
    """MLflow's status: RUNNING, FINISHED, FAILED or KILLED."""

    step: int | None
    """Number of steps, if it has finished; else the step of the newest checkpoint."""

    dataset: str
    """As given: a name, a folder, an archive or an address; empty, like `network`, if the run cannot be read."""

    network: str
    model: str
    """Name of the registered model, or `name/version` once the run's version is registered."""

    val_accuracy: float | None
    test_accuracy: float | None
    verdict: str
    """Outcome of the last gate that the version has reached: `passed`, `refused`, `serving failed`, or empty; while a
    person's approval is missing, `waits for approval` or `not approved`."""

    def cells(self) -> list[str]:
        """Returns the fields as texts, in their order."""
        return [
            self.run_id,
            f"{self.started.astimezone():%Y-%m-%d %H:%M}",
            self.status,
            "" if self.step is None else str(self.step),
            self.dataset,
            self.network,
            self.model,
            *("" if accuracy is None else f"{accuracy:.2%}" for accuracy in (self.val_accuracy, self.test_accuracy)),
            self.verdict,
        ]


def list_trainings(limit: int) -> list[Training]:
    """Returns the newest trainings, newest first."""
    store = open_bucket()
    runs = mlflow_runs.search_runs(MANIFEST_DIGEST, limit=limit)
    ids = [run.run_id for run in runs]
    parts = [ids[start : start + IDS_PER_REQUEST] for start in range(0, len(ids), IDS_PER_REQUEST)]
    found = [version for part in parts for version in search_versions(run_id=part)]
    versions = {version.run_id: version for version in reversed(found)}
    return in_parallel(lambda run: _training(store, run, versions.get(run.run_id)), runs)


def _training(store: ObjectStore, run: mlflow_runs.Run, version: RegisteredVersion | None) -> Training:
    config = None
    with suppress(UsageError):  # a run of another version of Convoy, which `resume` refuses with the reason
        config = read_record(run.run_id).config
    # A finished training drops the checkpoint that it had not begun to store.
    finished = store.read_record(bucket_layout.outcome(run.run_id), Outcome) if run.status == "FINISHED" else None
    newest = None if finished else next(commits_of(store, run.run_id), None)
    record = version.record if version else VersionRecord()
    return Training(
        run_id=run.run_id,
        started=run.started,
        status=run.status,
        step=finished.steps if finished else newest and newest.step,
        dataset=config.dataset if config else "",
        network=config.model if config else "",
        model=version.address if version else run.tags.get(MODEL, ""),
        val_accuracy=run.metrics.get("val/accuracy"),
        test_accuracy=run.metrics.get("test/accuracy"),
        verdict=record.outcome,
    )
