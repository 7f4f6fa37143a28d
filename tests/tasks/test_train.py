"""The train task with real ranks: what it returns, and how it fails."""

import gzip
import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from prefect import flow
from prefect.context import refresh_global_settings_context

from cnn.training.reports import StepReport
from infra.machine import stopping
from infra.machine.stopping import Stopped
from infra.settings import Settings
from infra.storage.object_store import ObjectStore
from tasks.config.run import RunConfig, load_config
from tasks.data.download import download
from tasks.data.preprocess import preprocess
from tasks.training.checkpoints import Commit, commits_of
from tasks.training.protocol.job import JobFolder
from tasks.training.rank import UtilisationMeter
from tasks.training.runs.tracked_run import TrackedRun, tracked_run
from tasks.training.train import TrainingFailed, TrainResult, _supervise, train
from tasks.training.utilisation import Utilisation
from tests.conftest import REPOSITORY
from tests.flows.program import ENDLESS, SMALL, NextTraining, Training, wait_for

DIGITS = {"dataset": "digits"}


@flow(persist_result=False)
def only_train(config: RunConfig, resume: str | None = None) -> TrainResult:
    dataset = preprocess(download(config.dataset), config.data)
    with tracked_run(config, dataset, resume) as run:
        opened.append(run)
        return train(run, dataset, config)


opened: list[TrackedRun] = []


@pytest.fixture(autouse=True)
def fresh(stack: object) -> None:
    refresh_global_settings_context()
    opened.clear()


def meanwhile(act: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


@pytest.mark.long
def test_without_restarts_a_killed_rank_ends_the_training_which_says_so_in_one_line(settings: Settings) -> None:
    next_training, disturbed = NextTraining(settings), list[Training]()

    def kill_the_first_rank() -> None:
        training = next_training.under_way()
        disturbed.append(training)
        min(training.processes("tasks.training.rank"), key=lambda process: process.pid).kill()

    killer = meanwhile(kill_the_first_rank)
    with pytest.raises(
        TrainingFailed, match=r"^the ranks died \(see .*train\.log\): rank \d was killed by SIGKILL$"
    ) as end:
        only_train(load_config(None, [*ENDLESS, "ranks=2", "restarts=0"], DIGITS))
    killer.join()
    assert end.value.exit_status == 1
    (training,) = disturbed
    training.assert_ends()
    assert MlflowClient().get_run(training.run_id).info.status == "FAILED"


@pytest.mark.slow
def test_steps_that_were_logged_before_the_first_checkpoint_are_not_logged_twice(settings: Settings) -> None:
    next_training, disturbed = NextTraining(settings), list[Training]()

    def kill_once_steps_are_logged() -> None:
        training = next_training.starts()
        wait_for(lambda: logged_steps(training.run_id), "MLflow to have steps")
        assert not checkpoints(settings, training.run_id)
        training.rank(0).kill()
        disturbed.append(training)

    killer = meanwhile(kill_once_steps_are_logged)
    # One epoch of 125 steps, and no checkpoint but at its end.
    long_epoch = ("data.limit=1000", "network.width=64", "batch_size=8", "augment.shift=0", "epochs=1", "lr=0.01")
    only_train(load_config(None, [*long_epoch, "ranks=1", "checkpoints.every=3600"], DIGITS))
    killer.join()
    (training,) = disturbed
    steps = logged_steps(training.run_id)
    assert steps == sorted(set(steps))
    assert steps[-1] == 125


def logged_steps(run_id: str) -> list[int]:
    return [point.step for point in MlflowClient().get_metric_history(run_id, "train/loss")]


def checkpoints(settings: Settings, run_id: str) -> list[Commit]:
    return list(commits_of(ObjectStore.connect(settings.bucket), run_id))


@pytest.mark.slow
def test_weights_reach_the_mlflow_run_although_the_flow_failed_between_the_training_and_that(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("on purpose")

    config = load_config(None, [*SMALL, "epochs=2", "ranks=1"], DIGITS)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="on purpose"):
        patch.setattr("infra.tracking.mlflow_runs.log_file", fail)
        only_train(config)
    (run,) = opened
    shutil.rmtree(settings.runs / run.run_id)  # as on another machine
    trained = only_train(config, run.run_id)
    assert trained.run_id == run.run_id
    found = MlflowClient().get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.tags["convoy.weights_sha256"] == trained.weights_sha256
    assert [item.path for item in MlflowClient().list_artifacts(run.run_id, "weights")] == ["weights/model.safetensors"]


@pytest.mark.faults
def test_a_loss_that_is_no_number_fails_the_training_with_its_step_and_commits_no_weights(
    settings: Settings,
) -> None:
    wild = ("lr=100", "schedule=constant", "weight_decay=1", "epochs=200", "ranks=1")
    with pytest.raises(
        TrainingFailed, match=r"^the loss or its gradient is not finite at step \d+, in lane .*; a lower lr"
    ) as end:
        only_train(load_config(None, [*SMALL, *wild], DIGITS))
    assert end.value.exit_status == 1
    (run,) = opened
    assert MlflowClient().get_run(run.run_id).info.status == "FAILED"
    assert list(ObjectStore.connect(settings.bucket).list(f"runs/{run.run_id}/weights/")) == []
    assert not (settings.runs / run.run_id / "train.log.1").exists()  # it would only do the same again


@pytest.mark.long
def test_steps_are_traced_on_request_and_the_result_says_what_the_ranks_waited_for(settings: Settings) -> None:
    steps = ["ranks=2", "data.limit=600", "epochs=1", "profile=3"]
    trained = only_train(load_config(None, [*SMALL, *steps], DIGITS))
    found = trained.utilisation
    assert found and 0 < found.peak_share < 1 and 0 <= found.data_share < 1 and 0 <= found.exchange_share < 1
    assert found.advice in found.line
    metrics = MlflowClient().get_run(trained.run_id).data.metrics
    assert metrics["train/gflops_per_second"] > 0 and 0 < metrics["train/peak_share"] < 1
    (stored,) = MlflowClient().list_artifacts(trained.run_id, "profile")
    trace = Path(MlflowClient().download_artifacts(trained.run_id, stored.path)).read_bytes()
    if trace.startswith(b"\x1f\x8b"):  # HTTP clients unpack what is called .gz
        trace = gzip.decompress(trace)
    events = json.loads(trace)["traceEvents"]
    assert [event["name"] for event in events if event["name"].startswith("ProfilerStep")] == [
        "ProfilerStep#4",
        "ProfilerStep#5",
        "ProfilerStep#6",
    ]


def test_a_stop_passes_on_what_the_ranks_said_at_their_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ending = f"""
import sys
from pathlib import Path
from tasks.training.protocol.job import Event, JobFolder
sys.stdin.read()
JobFolder(Path({str(tmp_path)!r})).write_event(Event(warning="the checkpoint of step 3 could not be stored"))
"""
    start = partial(subprocess.Popen, [sys.executable, "-c", ending], cwd=REPOSITORY, stdin=subprocess.PIPE)
    monkeypatch.setattr("tasks.training.train.subprocess.Popen", lambda *_, **__: start())

    def stop(_: float) -> None:
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(stopping, "wait", stop)
    with pytest.raises(Stopped):
        _supervise(JobFolder(tmp_path), pytest.fail)
    assert "the checkpoint of step 3 could not be stored" in caplog.text


def test_a_small_share_is_not_recorded_as_none() -> None:
    """A small network on a busy machine reaches a few ten-thousandths of the peak."""
    meter = UtilisationMeter()
    meter.add(
        StepReport(
            step=4, steps=4, loss=1.0, accuracy=0.5, gradient_norm=1.0, learning_rate=0.1,
            rank_seconds=(1.0, 2.0), data_seconds=0.0001, exchange_seconds=0.5,
        )
    )  # fmt: skip
    found = Utilisation(peak_share=0.000123, data_share=0.00005, exchange_share=0.25)
    assert meter.result(0.00012345) == found


@pytest.mark.parametrize(
    ("peak", "data", "exchange", "advice"),
    [
        (0.6, 0.3, 0.2, "images come too slowly"),
        (0.6, 0.1, 0.2, "look for a slow rank"),
        (0.1, 0.01, 0.02, "layers are small"),
        (0.7, 0.01, 0.02, "the devices are busy"),
    ],
)
def test_the_largest_loss_of_time_is_what_advice_is_given_about(
    peak: float, data: float, exchange: float, advice: str
) -> None:
    used = Utilisation(peak_share=peak, data_share=data, exchange_share=exchange)
    assert used.advice.startswith(advice)
