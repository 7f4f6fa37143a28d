"""Failures of a rank that the flow repairs: MLflow is away when it finishes, a file in the cache is damaged."""

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from mlflow.tracking import MlflowClient

from cnn.data.manifest import Manifest
from infra.errors import Outage, ServiceError
from infra.machine.files import file_digest
from infra.machine.lifeline import TORCHRUN_PID
from infra.settings import Settings
from infra.storage import bucket_layout
from infra.storage.object_store import ObjectStore
from infra.tracking import mlflow_runs
from tasks.config.run import CheckpointConfig, load_config
from tasks.data.dataset import DatasetRef, open_cache
from tasks.orchestration.retries import outlast
from tasks.training.checkpoints import finished_outcome
from tasks.training.platform import this_platform
from tasks.training.protocol.job import Job, JobFolder
from tasks.training.runs.tracked_run import TrackedRun
from tasks.training.train import train, train_to
from tests.cnn.conftest import Packed, digits, many_shards  # noqa: F401  # fixtures
from tests.infra.test_cache import flip
from tests.infra.test_tracking import free_address  # noqa: F401  # fixture
from tests.tasks.test_training_split import CONFIG, put


@pytest.fixture
def manifest(
    stack: object,
    store: ObjectStore,
    many_shards: Packed,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Manifest:
    """A packed dataset in the bucket `test`, with which commands and ranks work here."""
    monkeypatch.setenv("CONVOY_HOME", str(tmp_path))
    monkeypatch.setenv("CONVOY_BUCKET", store.bucket)
    return put(store, many_shards)


@pytest.fixture
def without_mlflow(manifest: Manifest, free_address: str) -> dict[str, str]:  # noqa: F811
    """An environment for a rank that this process starts, to which MLflow does not answer."""
    return os.environ | {"MLFLOW_TRACKING_URI": free_address, TORCHRUN_PID: str(os.getpid())}


@pytest.mark.slow
def test_metrics_that_mlflow_did_not_take_are_sent_by_the_flow_and_a_damaged_shard_is_told_of(
    manifest: Manifest,
    store: ObjectStore,
    without_mlflow: dict[str, str],
) -> None:
    damaged = open_cache(store).fetch(
        bucket_layout.shard((shard := manifest.splits["train"].shards[0]).sha256), shard.sha256
    )
    flip(damaged)
    run_id = mlflow_runs.start_run("last-metrics", "run", {}, {})
    folder = JobFolder(Settings().runs / run_id)
    job = Job(
        run_id=run_id, config=CONFIG, dataset_version=manifest.version, world_size=1, manifest_digest="ab" * 32,
        code_digest=this_platform().code_digest,
        checkpoints=CheckpointConfig(), restarts=0,
    )  # fmt: skip
    folder.write_job(job)
    rank = [sys.executable, "-m", "tasks.training.rank", str(folder.path)]
    subprocess.run(rank, env=without_mlflow, check=True, timeout=300)
    outcome = finished_outcome(store, run_id)
    assert outcome and outcome.steps and outcome == folder.read_outcome()
    assert [event.warning for event in folder.new_events() if event.warning and str(damaged) in event.warning]
    assert file_digest(damaged) == shard.sha256
    assert {row["step"] for row in outcome.metrics} >= set(range(1, outcome.steps + 1))
    assert MlflowClient().get_metric_history(run_id, "train/loss") == []

    run = TrackedRun(
        run_id=run_id,
        manifest_digest=job.manifest_digest,
        code_digest=job.code_digest,
        checkpoint_prefix=bucket_layout.checkpoints(run_id),
    )
    for _ in range(2):  # a resume after a crash does it again
        train.fn(run, DatasetRef(version=manifest.version, name="digits"), load_config(None, [], {"dataset": "digits"}))
        sent = [point.step for point in MlflowClient().get_metric_history(run_id, "train/loss")]
        assert sent == list(range(1, outcome.steps + 1))


@pytest.mark.slow
def test_metrics_of_a_training_that_pauses_are_sent_then_since_it_may_never_go_on(
    manifest: Manifest,
    monkeypatch: pytest.MonkeyPatch,
    without_mlflow: dict[str, str],
) -> None:
    dataset = DatasetRef(version=manifest.version, name="digits")
    config = load_config(None, ["epochs=3", "network.width=4", "batch_size=64"], {"dataset": "digits"})
    run_id = mlflow_runs.start_run("last-metrics", "paused", {}, {})
    run = TrackedRun(
        run_id=run_id,
        manifest_digest="ab" * 32,
        code_digest=this_platform().code_digest,
        checkpoint_prefix=bucket_layout.checkpoints(run_id),
    )

    def train_without_mlflow(folder: JobFolder, show: object) -> int:
        rank = [sys.executable, "-m", "tasks.training.rank", str(folder.path)]
        return subprocess.run(rank, env=without_mlflow, timeout=300).returncode

    monkeypatch.setattr("tasks.training.train._supervise", train_without_mlflow)
    for epoch in (1, 2):
        paused = train_to(run, dataset, config, epoch, ranks=1, show=lambda event: None)
        assert (paused.status, bool(paused.metrics)) == ("paused", True)
        sent = [point.step for point in MlflowClient().get_metric_history(run_id, "train/loss")]
        assert sent == list(range(1, paused.steps + 1))


@pytest.mark.long
def test_an_outage_is_outlasted_but_no_refusal(caplog: pytest.LogCaptureFixture) -> None:
    answers: list[Exception | None] = [Outage("MLflow is away"), httpx.ConnectError("Prefect is away"), None]

    def ask() -> str:
        if answer := answers.pop(0):
            raise answer
        return "there"

    assert outlast(ask) == "there"
    assert "trying again for up to 600 s: MLflow is away" in caplog.text
    answers += [ServiceError("no")]
    with pytest.raises(ServiceError, match="no"):
        outlast(ask)
    answers += [Outage("for good"), None]
    with pytest.raises(Outage, match="for good"):
        outlast(ask, patience=0.0)
