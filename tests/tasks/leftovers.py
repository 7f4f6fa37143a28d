"""Makes leftovers of trainings in an empty bucket, with the age that a test needs."""

import hashlib
import json
from collections.abc import Iterator
from datetime import timedelta
from itertools import count
from typing import Any
from uuid import uuid4

import pytest
from mlflow.tracking import MlflowClient
from prefect import Flow, get_client
from prefect.client.schemas.objects import FlowRun, State

from cnn.data.manifest import Manifest, Shard, SplitInfo
from infra.storage import bucket_layout
from infra.storage.bucket_layout import COMMIT
from infra.storage.object_store import ObjectInfo, ObjectStore
from infra.tracking import mlflow_runs
from infra.tracking.mlflow_runs import Run
from infra.tracking.model_registry import ModelVersion, create_version
from infra.tracking.tags import DATASET_VERSION, FLOW_RUN, MANIFEST_DIGEST
from tasks.training.checkpoints import STATE
from tests.cnn.conftest import source_report

EXPERIMENT = "leftovers"
OLD = 100.0  # days
NUMBERS = count()


class Leftovers:
    """Makes them."""

    def __init__(self, store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store = store
        self.days: dict[str, float] = {}
        self.deleted: list[str] = []
        self.runs: list[str] = []
        really_list, really_delete = ObjectStore.list, ObjectStore.delete

        def listing(store: ObjectStore, prefix: str) -> Iterator[ObjectInfo]:
            for info in really_list(store, prefix):
                assert info.modified
                age = timedelta(days=self.days.get(info.key, 0))
                yield info.model_copy(update={"modified": info.modified - age})

        def delete(store: ObjectStore, key: str) -> None:
            self.deleted.append(key)
            really_delete(store, key)

        monkeypatch.setattr(ObjectStore, "list", listing)
        monkeypatch.setattr(ObjectStore, "delete", delete)

    def hide_others(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Hide runs of other tests from searches."""
        search_runs = mlflow_runs.search_runs

        def ours(tag: str, *, running: bool = False) -> list[Run]:
            return [run for run in search_runs(tag, running=running) if run.run_id in self.runs]

        monkeypatch.setattr(mlflow_runs, "search_runs", ours)

    def end(self) -> None:
        """Close the runs that are open, for other tests."""
        for run_id in self.runs:
            if mlflow_runs.run_status(run_id) == "RUNNING":
                mlflow_runs.end_run(run_id, "KILLED")

    def put(self, key: str, data: bytes = b"x", days: float = OLD) -> str:
        """Write an object; returns its key."""
        self.store.put_bytes(key, data)
        self.days[key] = days
        return key

    def there(self, prefix: str = "") -> set[str]:
        return {info.key for info in self.store.list(prefix)}

    def dataset(self, *shards: str, days: float = OLD, raw: str | None = None) -> str:
        """A dataset version of these shards, and its step record; returns the version.

        Args:
            raw: digest of its source; None as in records by older code.
        """
        parts = [Shard(sha256=hashlib.sha256(each.encode()).hexdigest(), count=1, bytes=1) for each in shards]
        for part in parts:
            self.put(bucket_layout.shard(part.sha256), days=days)
        manifest = Manifest(
            classes=("a", uuid4().hex),  # each version is another: MLflow remembers those of other tests
            channels=1,
            image_size=1,
            splits={"train": SplitInfo(count=1, class_counts=(1, 0), shards=tuple(parts))},
            mean=(0.0,),
            std=(1.0,),
            report=source_report(),
        )
        self.put(bucket_layout.dataset_manifest(manifest.version), manifest.to_bytes(), days)
        record = json.dumps({"dataset_version": manifest.version} | ({"raw": raw} if raw else {})).encode()
        self.put(f"steps/preprocess/{manifest.version[::-1]}.json", record, days)
        return manifest.version

    def source(self, name: str, *files: str, days: float = OLD) -> str:
        """Raw files and the record of their source; returns the record's key."""
        entries = []
        for each in files:
            sha256 = hashlib.sha256(each.encode()).hexdigest()
            self.put(f"raw/{sha256}", each.encode(), days)
            entries.append({"path": each, "sha256": sha256, "size": len(each)})
        record = {"name": name, "format": "folder", "files": entries, "served_by": {".": "x"}}
        return self.put(f"sources/{name}-{next(NUMBERS)}.json", json.dumps(record).encode(), days)

    def run(
        self,
        status: str = "FINISHED",
        *,
        dataset: str = "0" * 64,
        name: str = "data",
        days: float = OLD,
        flow_run: str = "",
        pretrained: str | None = None,
        record: bool = True,
        checkpoints: bool = True,
    ) -> str:
        """An MLflow run with all that it leaves in the bucket; returns its id."""
        tags = {MANIFEST_DIGEST: "x", FLOW_RUN: flow_run or str(uuid4()), "convoy.dataset_version": dataset}
        run_id = mlflow_runs.start_run(EXPERIMENT, "run", {}, tags)
        self.runs.append(run_id)
        if status != "RUNNING":
            mlflow_runs.end_run(run_id, status)  # type: ignore[arg-type]
        if record:
            content = {
                "dataset": {"version": dataset, "name": name},
                "manifest": {"config": {"pretrained_sha256": pretrained}},
            }
            self.put(f"runs/{run_id}/run.json", json.dumps(content).encode(), days)
        if checkpoints:
            self.put(f"runs/{run_id}/checkpoints/step-00000007/{STATE}", days=days)
            self.put(f"runs/{run_id}/checkpoints/step-00000007/{COMMIT}", days=days)
        for file in ("weights/model.safetensors", f"weights/{COMMIT}"):
            self.put(f"runs/{run_id}/{file}", days=days)
        for file in ("reference.safetensors", "test-predictions.safetensors"):
            self.put(f"runs/{run_id}/{file}", days=days)
        return run_id

    def outputs(self, run_id: str) -> set[str]:
        """Returns the keys of a run's objects, without its checkpoints."""
        return {key for key in self.there(f"runs/{run_id}/") if "/checkpoints/" not in key}

    def version(self, run_id: str, dataset: str, name: str | None = None) -> ModelVersion:
        """Register a version that a run has made, without an alias."""
        client = MlflowClient()
        experiment = client.get_run(run_id).info.experiment_id
        model_id = client.create_logged_model(experiment, name="empty", source_run_id=run_id).model_id
        name = name or f"leftovers {uuid4().hex}"
        return create_version(name, model_id, run_id=run_id, tags={DATASET_VERSION: dataset})


def flow_run_in(state: State[Any], name: str = "leftover", **parameters: Any) -> FlowRun:
    """A flow run in Prefect that is in this state."""

    def nothing(resume: str | None = None, sweep: dict[str, str] | None = None) -> None:
        pass

    with get_client(sync_client=True) as client:
        return client.create_flow_run(Flow(nothing, name=name), parameters=parameters, state=state)
