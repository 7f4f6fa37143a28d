"""The list of trainings, on the real servers."""

from collections.abc import Iterator
from threading import Barrier
from types import SimpleNamespace
from uuid import uuid4

import pytest

from infra.storage import bucket_layout
from infra.storage.object_store import ObjectStore
from infra.tracking import mlflow_runs
from infra.tracking.tags import MANIFEST_DIGEST
from tasks.training.protocol.job import Outcome
from tasks.training.runs import run_list


def test_checkpoints_of_several_runs_are_looked_for_at_the_same_time(
    stack: object, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONVOY_BUCKET", store.bucket)
    runs = [mlflow_runs.start_run("run-list", "run", {}, {MANIFEST_DIGEST: uuid4().hex}) for _ in range(3)]
    together = Barrier(3)

    def commits_of(store: ObjectStore, run_id: str) -> Iterator[None]:
        together.wait(30)
        return iter(())

    monkeypatch.setattr(run_list, "commits_of", commits_of)
    assert [each.run_id for each in run_list.list_trainings(3)] == runs[::-1]
    for run_id in runs:
        mlflow_runs.end_run(run_id, "FINISHED")


def test_a_finished_training_has_all_its_steps_though_its_last_checkpoint_was_not_stored(
    stack: object, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when it ends while the checkpoint before is still being uploaded."""
    monkeypatch.setenv("CONVOY_BUCKET", store.bucket)
    run_id = mlflow_runs.start_run("run-list", "run", {}, {MANIFEST_DIGEST: uuid4().hex})
    outcome = Outcome(status="finished", steps=180)
    store.put_bytes(bucket_layout.outcome(run_id), outcome.model_dump_json().encode())
    commits = [SimpleNamespace(step=179)]
    monkeypatch.setattr(run_list, "commits_of", lambda store, run_id: iter(commits))
    steps = []
    for status in ("FAILED", "FINISHED"):
        mlflow_runs.end_run(run_id, status)  # type: ignore[arg-type]
        steps += [each.step for each in run_list.list_trainings(1)]
    assert steps == [179, 180]
