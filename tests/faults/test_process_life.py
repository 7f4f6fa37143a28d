"""However a training ends, nothing of it lives on, and its runs say how it ended."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from prefect import get_client
from prefect.client.schemas.objects import StateType
from prefect.states import Cancelled

from flows.summary import Summary
from infra.settings import Settings
from infra.stack.state import StackFolder
from tasks.training.protocol.job import JobFolder
from tests.flows.conftest import next_training, program  # noqa: F401
from tests.flows.program import (
    ENDLESS,
    SMALL,
    Done,
    NextTraining,
    Program,
    Training,
    flow_run_of,
    sets,
    wait_for,
)

pytestmark = pytest.mark.faults

TRAIN = ("train", "--dataset", "digits", "--summary", "out.json")


@pytest.fixture
def disturb(
    program: Callable[..., Program],  # noqa: F811
    next_training: NextTraining,  # noqa: F811
    tmp_path: Path,
) -> "Disturb":
    """Starts a training, does something to it, and waits for its end and for that of its processes."""

    def run(act: Callable[[Program, Training], None], *settings: str) -> tuple[Done, Training, Summary]:
        flow = program(*TRAIN, "--ranks", "2", *sets(*ENDLESS, *settings))
        training = next_training.under_way()
        act(flow, training)
        done = flow.wait()
        training.assert_ends()
        return done, training, Summary.model_validate_json((tmp_path / "out.json").read_bytes())

    return run


Disturb = Callable[..., tuple[Done, Training, Summary]]


def run_status(training: Training) -> str:
    return str(MlflowClient().get_run(training.run_id).info.status)


def flow_run_state(training: Training) -> StateType:
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(flow_run_of(training)).state
    assert state is not None
    return state.type


@pytest.mark.parametrize("module", ["tasks.training.supervisor", "tasks.training.torchrun"])
def test_killed_supervisor_or_torchrun_takes_the_ranks_along_and_without_restarts_the_flow_fails(
    disturb: Disturb, module: str
) -> None:
    def kill(_: Program, training: Training) -> None:
        (process,) = training.processes(module)
        process.kill()

    done, training, summary = disturb(kill, "restarts=0")
    assert done.status == 1
    assert done.complaint.endswith("train.log): they were killed")
    assert (summary.status, summary.exit_status) == ("failed", 1)
    assert run_status(training) == "FAILED"
    assert flow_run_state(training) == StateType.FAILED


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_rank_is_named_by_the_command_line_when_there_are_no_restarts(disturb: Disturb, rank: int) -> None:
    def kill(_: Program, training: Training) -> None:
        training.rank(rank).kill()

    done, training, summary = disturb(kill, "restarts=0")
    assert done.status == 1
    assert done.complaint.endswith(f"rank {rank} was killed by SIGKILL")
    assert (summary.status, summary.exit_status) == ("failed", 1)
    assert run_status(training) == "FAILED"


@pytest.mark.parametrize("sent, status", [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_interrupted_command_stops_the_ranks_and_ends_with_its_status(
    disturb: Disturb, sent: signal.Signals, status: int
) -> None:
    done, training, summary = disturb(lambda flow, _: flow.process.send_signal(sent))
    assert done.status == status
    assert "Traceback" not in done.stderr
    assert (summary.status, summary.exit_status) == ("interrupted", status)
    assert run_status(training) == "KILLED"
    assert flow_run_state(training) in (StateType.CRASHED, StateType.CANCELLED)


def test_a_stop_whose_checkpoint_the_storage_does_not_take_is_still_an_interruption(
    disturb: Disturb, settings: Settings
) -> None:
    storage = StackFolder(settings).members("seaweedfs")

    def stop_while_the_storage_hangs(_: Program, training: Training) -> None:
        for process in storage:
            process.suspend()
        try:
            training.rank(0).terminate()
            wait_for(lambda: not training.processes("tasks.training.rank"), "the ranks to end")
        finally:
            for process in storage:
                process.resume()

    done, training, summary = disturb(stop_while_the_storage_hangs, "checkpoints.every=3600")
    assert done.status == 75, done.stderr
    assert (summary.status, summary.exit_status) == ("interrupted", 75)
    outcome = JobFolder(training.folder).read_outcome()
    assert outcome
    assert outcome.status == "interrupted"
    assert "could not be stored within" in (training.folder / "events.jsonl").read_text()
    assert run_status(training) == "KILLED"


def test_second_ctrl_c_does_not_leave_ranks_behind(disturb: Disturb) -> None:
    def press_twice(flow: Program, training: Training) -> None:
        flow.process.send_signal(signal.SIGINT)
        wait_for(lambda: len(training.processes()) < 4, "the ranks to end")
        flow.process.send_signal(signal.SIGINT)

    done, training, _ = disturb(press_twice)
    assert done.status == 130
    assert run_status(training) in ("KILLED", "RUNNING")


def test_flow_run_set_to_cancelled_at_once_stops_too(disturb: Disturb) -> None:
    def cancel(_: Program, training: Training) -> None:
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(flow_run_of(training), Cancelled(), force=True)

    done, training, summary = disturb(cancel)
    assert (done.status, summary.status) == (75, "interrupted")
    assert "cancelled" in done.complaint
    assert run_status(training) == "KILLED"
    assert flow_run_state(training) == StateType.CANCELLED


def test_images_too_small_for_the_network_are_refused_and_register_nothing(
    program: Callable[..., Program],  # noqa: F811
    tmp_path: Path,
) -> None:
    settings = [setting for setting in SMALL if not setting.startswith("network.")]
    deep = ("model=notes", "network.channels=[8, 8, 8]", "network.kernel_sizes=[3]", "network.strides=[1]")
    done = program(*TRAIN, "--name", "too-small", "--ranks", "1", *sets(*settings, *deep)).wait()
    assert done.status == 2
    assert "8×8 pixels are too small for notes" in done.complaint
    assert Summary.model_validate_json((tmp_path / "out.json").read_bytes()).exit_status == 2
    assert not MlflowClient().search_registered_models("name = 'too-small'")


def test_system_metrics_of_a_training_reach_its_run(
    program: Callable[..., Program],  # noqa: F811
    next_training: NextTraining,  # noqa: F811
) -> None:
    program(*TRAIN, "--ranks", "1", *sets(*ENDLESS))
    training = next_training.under_way()

    def system_metrics() -> list[str]:
        return [name for name in MlflowClient().get_run(training.run_id).data.metrics if name.startswith("system/")]

    wait_for(system_metrics, "system metrics")
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= set(system_metrics())
