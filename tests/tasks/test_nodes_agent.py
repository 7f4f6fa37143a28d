"""The program of each node, without a cluster."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from cnn.config.training import TrainConfig
from infra.machine.network import free_port
from infra.settings import Settings
from infra.storage.object_store import ObjectStore
from infra.storage.s3_client import open_client
from tasks.config.launchers import Launch, NodesConfig
from tasks.config.run import CheckpointConfig
from tasks.training.launchers import nodes
from tasks.training.nodes.agent import Membership, Node, serve
from tasks.training.protocol.board import Board, Instruction, Invitation
from tasks.training.protocol.job import Event, Job, JobFolder
from tests.flows.program import handles_signals, wait_for


@pytest.fixture
def member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], Membership]:
    """Returns a factory of memberships whose storage does not answer; a membership appends its messages to the list."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port('127.0.0.1')}")
    job = Job(
        run_id="f00d",
        config=TrainConfig(),
        dataset_version="0" * 64,
        world_size=2,
        manifest_digest="",
        checkpoints=CheckpointConfig(),
        restarts=0,
    )
    node = Node(name="node", address="127.0.0.1", interface="lo", slots=1)
    board = Board(ObjectStore(open_client(timeout=1.0), "away"), job.run_id)
    return lambda said: Membership(node, board, job, JobFolder(tmp_path), said.append)


def test_an_agent_of_one_training_does_not_wait_for_ever(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after the training has ended, or with a mistyped id."""
    monkeypatch.setattr("tasks.training.nodes.agent.UNINVITED_SECONDS", 0.0)
    node = Node(name="node", address="127.0.0.1", interface="lo", slots=1)
    said: list[str] = []
    assert not serve(node, Settings(), store, lambda: False, said.append, "f00d")
    assert said[-1] == "run f00d has invited no node for 0 minutes; is it over?"


CANNOT_WRITE = """
import os, sys
from tasks.training.nodes import agent
from tasks.training.protocol.job import JobFolder
def full(folder, job):
    raise OSError(28, "No space left on device")
JobFolder.write_job = full
sys.exit(agent.main())
"""


@pytest.mark.long
def test_an_agent_that_cannot_take_part_says_why_and_fails(store: ObjectStore, tmp_path: Path) -> None:
    """So that the coordinator goes on without it, and Kubernetes or Ray starts another one."""
    board, folder = Board(store, "f00d"), ordered(tmp_path / "flow")
    board.invite(Invitation(job=folder.read_job()))
    board.write_order(Instruction(beat=1))
    variables = {"CONVOY_BUCKET": store.bucket, "CONVOY_HOME": str(tmp_path), "CONVOY_ADDRESS": "127.0.0.1"}
    command = [sys.executable, "-u", "-c", CANNOT_WRITE, "f00d"]
    with subprocess.Popen(command, env=os.environ | variables, stdout=subprocess.PIPE, text=True) as process:
        try:
            (node,) = wait_for(board.reports, "the node's first report")
            board.write_order(Instruction(beat=2, generation="1", members={node: 1}, leader=node))
            assert process.wait(60) == 75
            assert process.stdout and "this node cannot take part: " in process.stdout.read()
        finally:
            process.kill()
    report = board.report(node)
    assert report and report.outcome
    assert (report.generation, report.exit_status, report.outcome.status) == ("1", 1, "crashed")
    assert "No space left on device" in report.trouble


@pytest.mark.long
def test_an_agent_goes_on_when_its_output_cannot_be_written(store: ObjectStore, tmp_path: Path) -> None:
    variables = {"CONVOY_BUCKET": store.bucket, "CONVOY_HOME": str(tmp_path), "CONVOY_ADDRESS": "127.0.0.1"}
    command = [sys.executable, "-m", "tasks.training.nodes.agent", "f00d"]
    with (
        open("/dev/full", "w") as full,
        subprocess.Popen(command, env=os.environ | variables, stdout=full, stderr=full) as process,
    ):
        try:
            wait_for(lambda: handles_signals(process), "the handlers")
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 75
        finally:
            process.kill()


def test_all_that_people_have_to_know_is_passed_on_however_quick_the_steps_are(
    member: Callable[[list[str]], Membership], tmp_path: Path
) -> None:
    ranks, membership = JobFolder(tmp_path), member([])
    important = [Event(warning="slow"), Event(note="storing"), Event(step=9, total_steps=9, epoch=1, val_accuracy=0.0)]
    for step, event in enumerate(important):
        ranks.write_event(event)
        for _ in range(100):
            ranks.write_event(Event(step=step, total_steps=9, epoch=1))
    membership._take_events()
    taken = membership._events
    assert [event for event in taken if event in important] == important
    assert len(taken) < 10 and taken[-1] == Event(step=2, total_steps=9, epoch=1)


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "sent", "status"),
    [(["f00d"], signal.SIGTERM, 75), ([], signal.SIGTERM, 0), (["f00d"], signal.SIGINT, 130)],
)
def test_an_agent_that_is_ended_says_how(
    store: ObjectStore, tmp_path: Path, arguments: list[str], sent: signal.Signals, status: int
) -> None:
    """A pod of Kubernetes that was told to go is replaced only if it fails."""
    environment = os.environ | {
        "CONVOY_BUCKET": store.bucket,
        "CONVOY_HOME": str(tmp_path),
        "CONVOY_ADDRESS": "127.0.0.1",
    }
    command = [sys.executable, "-u", "-m", "tasks.training.nodes.agent", *arguments]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout and "waiting for a training" in process.stdout.readline()
            process.send_signal(sent)
            assert process.wait(60) == status
        finally:
            process.kill()


def test_node_can_be_told_to_leave_while_the_storage_does_not_answer(
    member: Callable[[list[str]], Membership],
) -> None:
    said: list[str] = []
    left: list[bool] = []
    told = threading.Event()
    thread = threading.Thread(target=lambda: left.append(member(said).run(told.is_set)), daemon=True)
    thread.start()
    wait_for(lambda: said, "the node to notice")
    assert said[0].startswith("the storage does not answer; the ranks go on: ")
    assert thread.is_alive()
    told.set()
    thread.join(30)
    assert left == [True]


def ordered(path: Path) -> JobFolder:
    """The folder of a training on nodes."""
    folder = JobFolder(path)
    folder.write_job(
        Job(
            run_id="f00d", config=TrainConfig(), dataset_version="0" * 64, world_size=2, manifest_digest="",
            checkpoints=CheckpointConfig(), restarts=0, launch=Launch(launcher="nodes", nodes=NodesConfig()),
        )
    )  # fmt: skip
    return folder


@pytest.mark.long
def test_the_flow_hears_why_the_agent_of_its_own_machine_has_ended(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONVOY_ADDRESS", "203.0.113.9")  # of no machine
    monkeypatch.setattr("tasks.training.launchers.watch.POLL_SECONDS", 0.1)
    folder = ordered(tmp_path)
    with nodes.agents(folder):
        (warning,) = wait_for(lambda: [event.warning for event in folder.new_events()], "the warning")
    assert warning.startswith("the agent of this machine has ended with status 2: error: ")
    assert "203.0.113.9" in warning


def test_the_agent_of_the_flows_own_machine_is_started_again_if_it_is_killed(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.training.launchers.watch.POLL_SECONDS", 0.1)
    folder = ordered(tmp_path)

    def is_agent(process: psutil.Process) -> bool:
        with suppress(psutil.Error):  # it has just been killed
            return process.status() != psutil.STATUS_ZOMBIE and "tasks.training.nodes.agent" in process.cmdline()
        return False

    def agents() -> list[psutil.Process]:
        return list(filter(is_agent, psutil.Process().children()))

    with nodes.agents(folder):
        (first,) = wait_for(agents, "the agent")
        first.kill()
        (second,) = wait_for(lambda: [each for each in agents() if each.pid != first.pid], "the next agent")
        (warning,) = wait_for(lambda: [event.warning for event in folder.new_events()], "the warning")
        assert warning and warning.startswith("the agent of this machine has ended with status -9")
    second.wait(10)
