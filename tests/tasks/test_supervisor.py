"""No process outlives its owner: the supervisor, and what it is made of, with real processes."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cnn.config import TrainConfig
from tasks.config import CheckpointConfig
from tasks.job import Job, JobFolder, Outcome
from tests.flows.program import Training, wait_for

# In one piece, since several say so at once.
SAY_PID_AND_SLEEP = "import os, time; os.write(1, bytes(f'{os.getpid()}', 'ascii') + bytes([10])); time.sleep(600)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SAY_PID_AND_SLEEP
OWNER = f"""
import subprocess, sys, time
from tasks.lifeline import die_with_parent
command = [sys.executable, "-c", {SAY_PID_AND_SLEEP!r}]
subprocess.Popen(command, preexec_fn=die_with_parent, start_new_session=True)
time.sleep(600)
"""
ORPHAN = """
import os, time
from tasks.lifeline import die_with_parent
parent = os.getpid()
if os.fork():
    os._exit(0)  # the parent is gone before its child asks to die with it
while os.getppid() == parent:
    time.sleep(0.01)
die_with_parent()
print("lives on", flush=True)
"""
CLEANER = f"""
import subprocess, sys
from tasks.lifeline import adopt_orphans, end_descendants
adopt_orphans()
# A child, a hidden grandchild that hears no SIGTERM, and one whose parent has ended.
start = "import subprocess as s, sys; s.Popen([sys.executable, '-c', sys.argv[1]], start_new_session=True)"
wait = "; import time; time.sleep(600)"
subprocess.Popen([sys.executable, "-c", {SAY_PID_AND_SLEEP!r}])
subprocess.Popen([sys.executable, "-c", start + wait, {STUBBORN!r}])
subprocess.run([sys.executable, "-c", start, {STUBBORN!r}])
sys.stdin.readline()
end_descendants(1.0)
print("ended", flush=True)
"""


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Programs to kill at the end of the test."""
    programs: list[subprocess.Popen[str]] = []
    yield programs
    for each in programs:
        each.kill()
        each.communicate()


def start(started: list[subprocess.Popen[str]], code: str) -> subprocess.Popen[str]:
    started.append(
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    )
    return started[-1]


def said(program: subprocess.Popen[str]) -> str:
    assert program.stdout
    return program.stdout.readline().strip()


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_process_dies_with_its_killed_parent(started: list[subprocess.Popen[str]]) -> None:
    owner = start(started, OWNER)
    child = int(said(owner))
    assert not gone(child)
    owner.kill()
    wait_for(lambda: gone(child), "the child to die")


def test_process_whose_parent_is_gone_already_ends_at_once(
    started: list[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The orphan goes to process 1, or to this process's own reaper, which takes the supervisor's place here.
    reaper = next(iter(reversed(psutil.Process().parents())), psutil.Process()).pid
    monkeypatch.setenv("CONVOY_SUPERVISOR_PID", str(reaper))
    orphan = start(started, ORPHAN)
    assert said(orphan) == ""


def test_all_descendants_are_ended_whatever_they_ignore_and_wherever_they_hide(
    started: list[subprocess.Popen[str]],
) -> None:
    cleaner = start(started, CLEANER)
    pids = [int(said(cleaner)) for _ in range(3)]
    assert not any(map(gone, pids))
    cleaner.communicate("now\n")
    assert all(map(gone, pids))


@pytest.fixture
def training(tmp_path: Path) -> Training:
    """A job whose dataset is nowhere: its ranks would fail."""
    return order(tmp_path, restarts=0)


def order(folder_of_test: Path, *, restarts: int) -> Training:
    folder = JobFolder(folder_of_test / "job")
    config = TrainConfig()
    folder.write_job(
        Job(
            run_id="f00d",
            config=config,
            dataset_version="0" * 64,
            world_size=2,
            manifest_digest="",
            checkpoints=CheckpointConfig(),
            restarts=restarts,
        )
    )
    return Training(folder.path)


def supervise(started: list[subprocess.Popen[str]], training: Training) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "tasks.supervisor", str(training.folder)]
    started.append(subprocess.Popen(command, stdin=subprocess.PIPE, text=True))
    return started[-1]


def test_supervisor_ends_torchrun_when_its_standard_input_closes(
    started: list[subprocess.Popen[str]], training: Training
) -> None:
    supervisor = supervise(started, training)
    wait_for(lambda: training.processes("torch.distributed.run"), "torchrun to start")
    assert supervisor.stdin
    supervisor.stdin.close()
    assert supervisor.wait(60) == 0  # as it was told
    assert training.processes() == []


def test_supervisor_that_is_told_to_end_takes_torchrun_along(
    started: list[subprocess.Popen[str]], training: Training
) -> None:
    supervisor = supervise(started, training)
    wait_for(lambda: training.processes("torch.distributed.run"), "torchrun to start")
    supervisor.terminate()
    assert supervisor.wait(60) == 128 + signal.SIGTERM
    assert training.processes() == []


def test_killed_supervisor_takes_torchrun_along(started: list[subprocess.Popen[str]], training: Training) -> None:
    supervisor = supervise(started, training)
    wait_for(lambda: training.processes("torch.distributed.run"), "torchrun to start")
    supervisor.kill()
    training.assert_ends()


def test_supervisor_starts_killed_ranks_again_as_often_as_it_may(
    started: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    training = order(tmp_path, restarts=2)
    supervisor = supervise(started, training)
    seen: set[int] = set()

    def another() -> psutil.Process | None:
        found = [process for process in training.processes("torch.distributed.run") if process.pid not in seen]
        return found[0] if found else None

    for _ in range(3):
        torchrun = wait_for(another, "torchrun to start")
        seen.add(torchrun.pid)
        torchrun.kill()
    assert supervisor.wait(60) not in (0, None)
    assert training.processes() == []
    assert sorted(path.name for path in training.folder.glob("train.log*")) == [
        "train.log",
        "train.log.1",
        "train.log.2",
    ]
    warnings = [event.warning for event in JobFolder(training.folder).new_events()]
    assert warnings == ["they were killed; starting again from the last checkpoint"] * 2


def test_supervisor_does_not_start_ranks_again_that_say_what_was_wrong(
    started: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    training = order(tmp_path, restarts=2)
    wrong = Outcome(status="failed", error="the loss is not finite", exit_status=1)
    supervisor = supervise(started, training)
    torchrun = wait_for(lambda: training.processes("torch.distributed.run"), "torchrun to start")[0]
    JobFolder(training.folder).write_outcome(wrong)
    torchrun.kill()
    supervisor.wait(60)
    assert training.processes() == []
    assert JobFolder(training.folder).read_outcome() == wrong
    assert not (training.folder / "train.log.1").exists()


def test_launcher_that_cannot_start_says_so_in_the_outcome(
    started: list[subprocess.Popen[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = order(tmp_path, restarts=0)
    folder = JobFolder(training.folder)
    folder.write_job(folder.read_job().model_copy(update={"launcher": "kubernetes"}))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    assert supervise(started, training).wait(60) == 2
    outcome = folder.read_outcome()
    assert outcome and (outcome.status, outcome.exit_status) == ("failed", 2)
    assert "no Kubernetes cluster" in outcome.error
