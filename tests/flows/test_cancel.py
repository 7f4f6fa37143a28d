"""A training ends with its flow: when the flow is killed or gets a signal, and when it is cancelled in Prefect."""

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from uuid import UUID, uuid4

import psutil
import pytest
from mlflow.tracking import MlflowClient
from prefect import get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.client.schemas.objects import StateType
from prefect.states import Cancelling, Crashed

from flows.summary import Summary
from tasks.orchestration.flow_runs import may_go_on
from tests.conftest import REPOSITORY
from tests.flows.conftest import Convoy
from tests.flows.program import ENDLESS, NextTraining, Program, Training, flow_run_of, sets


def listening(training: Training) -> set[str]:
    """Addresses at which the processes of a training can be reached."""
    return {
        connection.laddr.ip
        for process in training.processes()
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    }


@pytest.mark.long
def test_no_process_of_a_training_outlives_a_killed_flow(
    program: Callable[..., Program], next_training: NextTraining
) -> None:
    flow = program("train", "--dataset", "digits", "--ranks", "2", *sets(*ENDLESS))
    training = next_training.under_way()
    assert len(training.processes("tasks.training.rank")) == 2
    assert len(training.processes()) == 4
    assert listening(training) == {"127.0.0.1"}
    flow.process.kill()
    training.assert_ends()


@pytest.mark.long
def test_a_flow_run_cancelled_in_prefect_stops_its_ranks_and_ends_as_cancelled(
    convoy: Convoy, next_training: NextTraining, tmp_path: Path
) -> None:
    cancelled: list[Training] = []

    def cancel() -> None:
        training = next_training.under_way()
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(flow_run_of(training), Cancelling())
        cancelled.append(training)

    canceller = threading.Thread(target=cancel, daemon=True)
    canceller.start()
    done = convoy(
        *("train", "--dataset", "digits", "--ranks", "1", "--name", "cancelled", *sets(*ENDLESS)),
        *("--summary", str(tmp_path / "out.json")),
    )
    canceller.join()
    (training,) = cancelled
    training.assert_ends()
    assert done.status == 75
    assert "cancelled" in done.complaint
    assert f"`convoy resume {training.run_id}` goes on" in done.stderr
    summary = Summary.model_validate_json((tmp_path / "out.json").read_bytes())
    assert (summary.status, summary.exit_status) == ("interrupted", 75)
    assert MlflowClient().get_run(training.run_id).info.status == "KILLED"
    assert not MlflowClient().search_registered_models("name = 'cancelled'")
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(flow_run_of(training)).state
    assert state
    assert state.type == StateType.CANCELLED


@pytest.mark.long
def test_a_task_does_not_begin_in_a_cancelled_flow_run(stack: object, quiet_prefect: None) -> None:
    from prefect import flow
    from prefect.runtime import flow_run

    from tasks.orchestration.cancellation import Cancelled, stop_if_cancelled

    found: list[bool] = []

    @flow(name="cancelled-between-tasks")
    def between_tasks() -> None:
        stop_if_cancelled()
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(UUID(flow_run.id), Cancelling())
        try:
            stop_if_cancelled()
        except Cancelled:
            found.append(True)

    between_tasks(return_state=True)
    assert found == [True]


@pytest.mark.long
def test_a_flow_run_that_counts_as_crashed_while_it_lives_is_left_to_be_resumed(
    stack: object, quiet_prefect: None
) -> None:
    """It was cut off from Prefect; a worker elsewhere cannot go on with it, and one of this machine's kind could."""
    from prefect import flow
    from prefect.runtime import flow_run

    from tasks.orchestration.cancellation import Superseded, is_cancelled
    from tasks.orchestration.failure import failure_told

    ids: list[UUID] = []

    @flow(name="cut-off")
    def cut_off() -> None:
        ids.append(UUID(flow_run.id))
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(ids[0], Crashed(message="no sign of life for 5 minutes"), force=True)
        with failure_told(minor=True):
            is_cancelled()

    with pytest.raises(Superseded):
        cut_off()
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(ids[0])
    assert may_go_on(run.model_copy(update={"deployment_id": uuid4()}))  # as if a deployment had started it


SIGNALLED = """
import os, signal
from prefect import flow
from infra.machine import stopping
from tasks.orchestration.cancellation import sigterm_is_checked_for
def send():
    for _ in range(2):  # as a service manager does: to the worker, which forwards it, and to each of its processes
        os.kill(os.getpid(), signal.SIGTERM)
    print("sent", flush=True)
@flow(name={name!r})
def signalled():
    with sigterm_is_checked_for():
        {inside}
    {after}
signalled()
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "inside", "after", "said"),
    [
        ("signalled-inside", "send(); stopping.check()", "print('not here')", "sent\n"),
        ("signalled-after", "print('began')", "send()", "began\n"),
    ],
)
def test_a_signal_raises_in_a_training_only_where_it_is_checked_for(
    stack: object, name: str, inside: str, after: str, said: str
) -> None:
    """The process is as a worker starts it: Prefect's handler, which would raise immediately, is in its main thread."""
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED.format(name=name, inside=inside, after=after)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, said), done.stderr
    with get_client(sync_client=True) as client:
        (run,) = client.read_flow_runs(flow_filter=FlowFilter(name=FlowFilterName(any_=[name])))
    assert run.state_type == StateType.CRASHED
