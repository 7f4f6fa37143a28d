"""The train task with real ranks: what it returns, and how it fails."""

import threading
from collections.abc import Callable

import pytest
from mlflow.tracking import MlflowClient
from prefect import flow
from prefect.context import refresh_global_settings_context

from infra.settings import Settings
from tasks.config import RunConfig, load_config
from tasks.download import download
from tasks.preprocess import preprocess
from tasks.run import TrackedRun, tracked_run
from tasks.train import TrainingFailed, TrainResult, train
from tests.flows.program import ENDLESS, SMALL, NextTraining, Training

DIGITS = {"dataset": "digits"}


@flow(persist_result=False)
def only_train(config: RunConfig) -> TrainResult:
    dataset = preprocess(download(config.dataset), config.data)
    with tracked_run(config, dataset) as run:
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


def test_a_killed_rank_ends_the_training_which_says_so_in_one_line(settings: Settings) -> None:
    next_training, disturbed = NextTraining(settings), list[Training]()

    def kill_the_first_rank() -> None:
        training = next_training.under_way()
        disturbed.append(training)
        min(training.processes("tasks.rank"), key=lambda process: process.pid).kill()

    killer = meanwhile(kill_the_first_rank)
    with pytest.raises(
        TrainingFailed, match=r"^the ranks died \(see .*train\.log\): rank \d was killed by SIGKILL$"
    ) as end:
        only_train(load_config(None, [*ENDLESS, "ranks=2"], DIGITS))
    killer.join()
    assert end.value.exit_status == 1
    (training,) = disturbed
    training.assert_ends()
    assert MlflowClient().get_run(training.run_id).info.status == "FAILED"


@pytest.mark.faults
def test_a_loss_that_is_no_number_fails_the_training_with_its_step_and_commits_no_weights(
    settings: Settings,
) -> None:
    from infra.objectstore import ObjectStore

    wild = ("lr=100", "schedule=constant", "weight_decay=1", "epochs=200", "ranks=1")
    with pytest.raises(
        TrainingFailed, match=r"^the loss became (nan|inf) at step \d+ \(learning rate 100\); a lower lr"
    ) as end:
        only_train(load_config(None, [*SMALL, *wild], DIGITS))
    assert end.value.exit_status == 1
    (run,) = opened
    assert MlflowClient().get_run(run.run_id).info.status == "FAILED"
    assert list(ObjectStore.connect(settings.bucket).list(f"runs/{run.run_id}/")) == []
