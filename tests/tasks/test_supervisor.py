"""No process outlives its owner: tests the supervisor and its parts with real processes."""

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cnn.config.training import TrainConfig
from infra.errors import Outage
from infra.machine.network import free_port
from tasks.config.launchers import Launch
from tasks.config.run import CheckpointConfig
from tasks.orchestration import outage
from tasks.orchestration.outage import through_outage
from tasks.training.platform import this_platform
from tasks.training.protocol.job import Job, JobFolder, Outcome
from tasks.training.torchrun import node_options, start_torchrun
from tasks.training.train import TrainingFailed, _run, await_earlier_start
from tests.flows.program import Training, wait_for

# In one write, since several processes print at the same time.
SAY_PID_AND_SLEEP = "import os, time; os.write(1, bytes(f'{os.getpid()}', 'ascii') + bytes([10])); time.sleep(600)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SAY_PID_AND_SLEEP
OWNER = f"""
import subprocess, sys, time
from infra.machine.lifeline import dying_with_this_process
command = [sys.executable, "-c", {SAY_PID_AND_SLEEP!r}]
subprocess.Popen(command, preexec_fn=dying_with_this_process(), start_new_session=True)
time.sleep(600)
"""
ORPHAN = """
import os, time
from infra.machine.lifeline import die_with_parent
parent = os.getpid()
if os.fork():
    os._exit(0)  # the parent is gone before its child asks to die with it
while os.getppid() == parent:
    time.sleep(0.01)
die_with_parent(parent)
print("lives on", flush=True)
"""
CLEANER = f"""
import subprocess, sys
from infra.machine.lifeline import adopt_orphans, end_descendants
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


def test_process_whose_parent_is_gone_already_ends_at_once(started: list[subprocess.Popen[str]]) -> None:
    orphan = start(started, ORPHAN)
    assert said(orphan) == ""


def as_process_one(code: str) -> str:
    """Runs a program as process 1 of a namespace, as a container does without an init; returns what it printed."""
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    probe = subprocess.run([*command, "true"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"no process namespaces here (they take root): {probe.stderr.strip()}")
    done = subprocess.run([*command, sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_process_one_of_a_container_can_have_children_that_die_with_it() -> None:
    program = f"""
import os, subprocess, sys
from infra.machine.lifeline import dying_with_this_process
assert os.getpid() == 1
child = subprocess.Popen(
    [sys.executable, "-c", {SAY_PID_AND_SLEEP!r}], stdout=subprocess.PIPE, preexec_fn=dying_with_this_process()
)
print(int(child.stdout.readline()) == child.pid)
"""
    assert as_process_one(program) == "True\n"


def test_supervisor_whose_flow_is_process_one_of_a_container_is_no_orphan(tmp_path: Path) -> None:
    program = f"""
import os, subprocess, sys, psutil
from pathlib import Path
from infra.machine.locks import try_locked
from tasks.training.liveness import orphaned
assert os.getpid() == 1
command = [sys.executable, "-c", {SAY_PID_AND_SLEEP!r}, "-m", "tasks.training.supervisor", {str(tmp_path)!r}]
with try_locked(Path({str(tmp_path)!r}, "lock")):
    child = subprocess.Popen(command, stdout=subprocess.PIPE)
    child.stdout.readline()
    print(orphaned(psutil.Process(child.pid)))
"""
    assert as_process_one(program) == "False\n"


def test_all_descendants_are_ended_whatever_they_ignore_and_wherever_they_hide(
    started: list[subprocess.Popen[str]],
) -> None:
    cleaner = start(started, CLEANER)
    pids = [int(said(cleaner)) for _ in range(3)]
    assert not any(map(gone, pids))
    cleaner.communicate("now\n")
    assert all(map(gone, pids))


WAITS_INSIDE_PYTORCH = """
from datetime import timedelta
import torch.distributed as dist
from tasks.training import rank
met = {met}
rank.STOP_STEP_WAIT = 0.5 if met else 600.0
stop = rank.StopSignal()
if met:
    stop.ranks_have_met()
print("waiting", flush=True)
dist.HashStore().wait(["a rank that is gone"], timedelta(seconds=600))
"""


@pytest.mark.long
@pytest.mark.parametrize("met", [True, False])  # before the rendezvous, immediately
def test_rank_that_waits_inside_pytorch_ends_itself_after_sigterm(
    started: list[subprocess.Popen[str]], met: bool
) -> None:
    waiting = start(started, WAITS_INSIDE_PYTORCH.format(met=met))
    assert said(waiting) == "waiting"
    waiting.terminate()
    assert waiting.wait(60) == 1


@pytest.mark.long
def test_an_outage_at_the_end_of_long_work_is_waited_for_and_told_once() -> None:
    told: list[str] = []
    answers = iter([Outage("the storage is away"), Outage("still"), None])

    def work() -> str:
        if error := next(answers):
            raise error
        return "done"

    assert through_outage(work, told.append) == "done"
    assert told == ["trying again for up to 180 s: the storage is away"]
    assert outage.MAX_OUTAGE_SECONDS >= 120
    with pytest.raises(Outage, match="for ever"):
        through_outage(always_away, told.append, patience=0.0)


def always_away() -> None:
    raise Outage("away for ever")


@pytest.fixture
def training(tmp_path: Path) -> Training:
    """Writes a job whose dataset does not exist, so that its ranks would fail."""
    return order(tmp_path, restarts=0)


def order(folder_of_test: Path, *, restarts: int, code_digest: str = "") -> Training:
    folder = JobFolder(folder_of_test / "job")
    config = TrainConfig()
    folder.write_job(
        Job(
            run_id="f00d",
            config=config,
            dataset_version="0" * 64,
            world_size=2,
            manifest_digest="",
            code_digest=code_digest or this_platform().code_digest,
            checkpoints=CheckpointConfig(),
            restarts=restarts,
        )
    )
    return Training(folder.path)


def supervise(started: list[subprocess.Popen[str]], training: Training) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "tasks.training.supervisor", str(training.folder)]
    started.append(subprocess.Popen(command, stdin=subprocess.PIPE, text=True))
    return started[-1]


def test_supervisor_ends_torchrun_when_its_standard_input_closes(
    started: list[subprocess.Popen[str]], training: Training
) -> None:
    supervisor = supervise(started, training)
    wait_for(lambda: training.processes("tasks.training.torchrun"), "torchrun to start")
    assert supervisor.stdin
    supervisor.stdin.close()
    assert supervisor.wait(60) == 0  # a stop that was asked for
    assert training.processes() == []


def test_supervisor_that_is_told_to_end_takes_torchrun_along(
    started: list[subprocess.Popen[str]], training: Training
) -> None:
    supervisor = supervise(started, training)
    wait_for(lambda: training.processes("tasks.training.torchrun"), "torchrun to start")
    supervisor.terminate()
    assert supervisor.wait(60) == 128 + signal.SIGTERM
    assert training.processes() == []


HURRIED = """
import subprocess, sys
from pathlib import Path
from tasks.training.launchers import local
from tasks.training.protocol.job import JobFolder
local.HUNG_RANKS_WAIT, local.SUPERVISOR_WAIT = 0.5, 600.0
deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); signal.pause()"
rank = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE)
rank.stdout.readline()
print(rank.pid, flush=True)
local._end_ranks(JobFolder(Path({folder!r})))
"""


@pytest.mark.long
@pytest.mark.parametrize("stopped", [False, True])
def test_a_hung_rank_is_killed_sooner_when_the_ranks_have_not_come_to_the_stop(
    started: list[subprocess.Popen[str]], training: Training, stopped: bool
) -> None:
    folder = JobFolder(training.folder)
    if stopped:
        folder.mark_stopped()
    ending = start(started, HURRIED.format(folder=str(folder.path)))
    rank = int(said(ending))
    if stopped:  # a checkpoint is being stored
        with pytest.raises(subprocess.TimeoutExpired):
            ending.wait(2)
        (folder.path / "stopped").unlink()
    assert ending.wait(60) == 0
    assert gone(rank)


@pytest.mark.long
def test_killed_supervisor_takes_torchrun_along_which_has_said_nothing_that_would_look_like_the_cause(
    started: list[subprocess.Popen[str]], training: Training
) -> None:
    supervisor = supervise(started, training)
    wait_for(lambda: training.processes("tasks.training.rank"), "the ranks to start")
    supervisor.kill()
    training.assert_ends()
    assert JobFolder(training.folder).log_end() == "they were killed"


@pytest.mark.long
def test_torchrun_loads_the_library_of_the_network_before_it_forks_its_ranks_and_starts_no_thread(
    tmp_path: Path,
) -> None:
    folder = JobFolder(order(tmp_path, restarts=0).folder)
    job = folder.read_job()
    folder.write_job(job.model_copy(update={"config": TrainConfig(model="efficientnet_lite0")}))
    code = (
        "import os, sys, torch.distributed.run; from pathlib import Path\n"
        "from tasks.training.forked_ranks import load_network; load_network(Path(sys.argv[1]))\n"
        "print('timm' in sys.modules, len(os.listdir('/proc/self/task')))"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as torchrun is started
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, folder.path], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "True 1\n"


def test_flow_starts_another_supervisor_in_place_of_a_killed_one_as_often_as_it_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.training.train.run_logger", lambda: logging.getLogger("test"))
    training = order(tmp_path, restarts=1)
    told: list[str | None] = []
    flow = threading.Thread(target=lambda: ended.append(_end_of(training, told)), daemon=True)
    ended: list[str] = []
    flow.start()
    seen: set[int] = set()

    def another() -> psutil.Process | None:
        return next((each for each in training.processes("tasks.training.supervisor") if each.pid not in seen), None)

    for _ in range(2):
        supervisor = wait_for(another, "a supervisor to start")
        seen.add(supervisor.pid)
        wait_for(lambda: training.processes("tasks.training.torchrun"), "torchrun to start")
        supervisor.kill()
    flow.join(60)
    training.assert_ends()
    assert told == ["the supervisor was killed by signal 9; starting again from the last checkpoint"]
    assert ended == [f"the ranks died (see {training.folder}/train.log): they were killed"]


def test_another_start_waits_for_the_processes_of_an_earlier_one(
    started: list[subprocess.Popen[str]], training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.training.train.run_logger", lambda: logging.getLogger("test"))
    earlier = supervise(started, training)
    wait_for(lambda: training.processes("tasks.training.torchrun"), "torchrun to start")
    waiting = threading.Thread(target=await_earlier_start, args=[JobFolder(training.folder)], daemon=True)
    waiting.start()
    waiting.join(1.0)
    assert waiting.is_alive()
    assert earlier.stdin
    earlier.stdin.close()
    waiting.join(60)
    assert not waiting.is_alive()
    assert training.processes() == []


def _end_of(training: Training, told: list[str | None]) -> str:
    """How the train task ends."""
    try:
        return str(_run(JobFolder(training.folder), lambda event: told.append(event.warning)))
    except TrainingFailed as failed:
        return str(failed)


WATCHES_UNPICKLING = """
import os, sys

def watch(event, _):
    if event == "pickle.find_class":
        with open(os.environ["SEEN_UNPICKLING"], "a") as file:
            print(sys.argv, file=file)

sys.addaudithook(watch)
"""


@pytest.fixture
def unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that Python programs write to when they unpickle."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(WATCHES_UNPICKLING)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *sys.path]))
    monkeypatch.setenv("SEEN_UNPICKLING", str(tmp_path / "unpickled"))
    subprocess.run([sys.executable, "-c", "import pickle; pickle.loads(pickle.dumps(print))"], check=True)
    assert (tmp_path / "unpickled").exists()
    (tmp_path / "unpickled").unlink()
    return tmp_path / "unpickled"


def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends ranks to a storage that refuses connections."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port('127.0.0.1')}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")


@pytest.mark.long
def test_nothing_unpickles_where_ranks_are_started(
    started: list[subprocess.Popen[str]], training: Training, unpickled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere(monkeypatch)
    supervisor = supervise(started, training)
    wait_for(lambda: training.processes("tasks.training.rank"), "the ranks to start")
    assert supervisor.stdin
    supervisor.stdin.close()
    supervisor.wait(60)
    assert not unpickled.exists()


@pytest.mark.long
def test_nodes_meet_without_unpickling(
    training: Training, unpickled: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nowhere(monkeypatch)
    meeting = f"127.0.0.1:{free_port('127.0.0.1')}"
    with (tmp_path / "log").open("wb") as log:
        nodes = [
            start_torchrun(
                training.folder,
                ranks=1,
                rendezvous=node_options("generation", meeting, number, 2, "127.0.0.1"),
                interface="lo",
                log=log.fileno(),
            )
            for number in range(2)
        ]
    try:
        wait_for(lambda: len(training.processes("tasks.training.rank")) == 2, "the ranks of both nodes to start")
        assert {training.rank(number).ppid() for number in range(2)} == {node.pid for node in nodes}
    finally:
        for node in nodes:
            node.kill()
            node.wait()
        training.assert_ends()
    assert not unpickled.exists()


@pytest.mark.long
def test_supervisor_leaves_no_file_behind_but_those_of_its_folder(
    started: list[subprocess.Popen[str]], training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    supervisor = supervise(started, training)
    wait_for(lambda: training.processes("tasks.training.rank"), "the ranks to start")
    supervisor.kill()
    training.assert_ends()
    assert list((tmp_path / "tmp").iterdir()) == []


def test_supervisor_starts_killed_ranks_again_as_often_as_it_may(
    started: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    training = order(tmp_path, restarts=2)
    supervisor = supervise(started, training)
    seen: set[int] = set()

    def another() -> psutil.Process | None:
        found = [process for process in training.processes("tasks.training.torchrun") if process.pid not in seen]
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


@pytest.mark.long
def test_ranks_that_load_other_code_than_the_training_began_with_end_it(
    started: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    """As after an upgrade beside a training, when its ranks are started again."""
    training = order(tmp_path, restarts=2, code_digest="1" * 64)
    assert supervise(started, training).wait(120) == 1
    outcome = JobFolder(training.folder).read_outcome()
    assert outcome and (outcome.status, outcome.exit_status) == ("failed", 2)
    assert outcome.error.startswith("Convoy's code changed after this training had begun; train again, or restore ")
    assert not list(training.folder.glob("train.log.*"))


def test_supervisor_does_not_start_ranks_again_that_say_what_was_wrong(
    started: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    training = order(tmp_path, restarts=2)
    wrong = Outcome(status="failed", error="the loss is not finite", exit_status=1)
    supervisor = supervise(started, training)
    torchrun = wait_for(lambda: training.processes("tasks.training.torchrun"), "torchrun to start")[0]
    JobFolder(training.folder).write_outcome(wrong)
    torchrun.kill()
    supervisor.wait(60)
    assert training.processes() == []
    assert JobFolder(training.folder).read_outcome() == wrong
    assert not (training.folder / "train.log.1").exists()


@pytest.mark.long
def test_launcher_that_cannot_start_says_so_in_the_outcome(
    started: list[subprocess.Popen[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = order(tmp_path, restarts=0)
    folder = JobFolder(training.folder)
    folder.write_job(folder.read_job().model_copy(update={"launch": Launch(launcher="kubernetes")}))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    for text in (None, "clusters: 3", "clusters: [", "apiVersion: v1\nclusters: []"):
        if text:
            (tmp_path / "none").write_text(text)
        assert supervise(started, training).wait(60) == 2
        outcome = folder.read_outcome()
        assert outcome and (outcome.status, outcome.exit_status) == ("failed", 2)
        assert outcome.error.startswith("no Kubernetes cluster: ")


def test_an_error_that_nothing_expects_is_the_outcome(started: list[subprocess.Popen[str]], tmp_path: Path) -> None:
    """Else it would look as if the ranks had been killed, and a worker would resume the training again and again."""
    training = order(tmp_path, restarts=0)
    (training.folder / "train.log").mkdir()
    assert supervise(started, training).wait(60) == 1
    outcome = JobFolder(training.folder).read_outcome()
    assert outcome and (outcome.status, outcome.resumable) == ("failed", False)
    assert outcome.error.startswith("IsADirectoryError: ")
