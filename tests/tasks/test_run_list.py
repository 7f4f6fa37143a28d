"""The list of trainings, on the real servers."""

from collections.abc import Iterator
from threading import Barrier
from uuid import uuid4

import pytest

from infra.storage.object_store import ObjectStore
from infra.tracking import mlflow_runs
from infra.tracking.tags import MANIFEST_DIGEST
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
