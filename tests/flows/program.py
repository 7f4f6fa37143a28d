"""Helpers for tests that run whole flows: the command line as a program, and the processes of a training."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
from mlflow.tracking import MlflowClient
from prefect import get_client
from prefect.events import Event
from prefect.events.filters import EventFilter, EventNameFilter, EventResourceFilter

from flows.summary import Summary
from infra.machine.lifeline import RANK_NAME
from infra.settings import Settings

PATIENCE = 120.0  # seconds until a wait counts as a failure, on a busy machine
ENDS_WITHIN = 20.0  # seconds that a training's processes have to end

PF_EXITING = 0x4  # in the flags of proc_pid_stat(5)

CODE = "from flows.cli import main; main()"
CONVOY = (sys.executable, "-P", "-c", CODE)

# Small, and long enough that a test can disturb it in time.
# What no gate refuses, and what takes no time to try.
LET_PASS = ("gate.floor=0", "gate.min_class_recall=0", "serving.http=false")
SMALL = ("data.limit=400", "network.width=4", "batch_size=64", "augment.shift=0", *LET_PASS)
ENDLESS = (*SMALL, "epochs=100000")

# All that a step may depend on, and so all that a checkpoint must hold; 180 steps in some seconds.
RESUMABLE = (
    *("data.limit=400", "network.width=4", "batch_size=32", "epochs=15", "lr=0.1"),
    *("ema=0.9", "select=best", "augment.mixup=0.3", "network.dropout=0.1", "checkpoints.every=0.3"),
    *LET_PASS,
)
RESUMABLE_STEPS = 180

NOT_EXACT = re.compile(
    r"(system|work|accuracy)/|train/(rank_seconds_|data_wait_|exchange_wait_|images_per_|gflops_|peak_)|test/"
)
"""Metrics that differ from run to run; and those of the evaluation, which are checked separately."""


def wait_for(condition: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
    """Polls until `condition` returns a true value; returns this value."""
    deadline = time.monotonic() + patience
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.1)
    return found


def handles_signals(process: subprocess.Popen[bytes]) -> bool:
    """Whether a program has handlers of its own for SIGTERM and Ctrl-C."""
    both = (1 << signal.SIGTERM - 1) | (1 << signal.SIGINT - 1)
    found = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
    return bool(found) and int(found[1], 16) & both == both  # type: ignore[index]


def reported(event: str, flow_run_id: str) -> str:
    """Waits until Prefect has stored an event of a flow run; returns the event's text."""
    wanted = EventResourceFilter(id=[f"prefect.flow-run.{flow_run_id}"])

    def found() -> list[Event]:
        with get_client(sync_client=True) as client:
            return client.read_events(EventFilter(event=EventNameFilter(name=[event]), resource=wanted), limit=1).events

    (only,) = wait_for(found, f"{event} of {flow_run_id}", 30)
    return str(only.payload["text"])


def sets(*settings: str) -> list[str]:
    """`--set` options."""
    return [word for setting in settings for word in ("--set", setting)]


@dataclass(frozen=True)
class Done:
    """The result of a command."""

    status: int
    stdout: str
    stderr: str

    @property
    def complaint(self) -> str:
        """Returns the last line of a failed command; there must be no traceback."""
        assert "Traceback" not in self.stderr, self.stderr
        lines = self.stderr.strip().splitlines() or [""]
        assert lines[-1].startswith("convoy: "), self.stderr
        assert sum(line.startswith("convoy: ") for line in lines) == 1, self.stderr
        return lines[-1].removeprefix("convoy: ")


class Program:
    """`convoy` with arguments, as a process of its own."""

    def __init__(self, *arguments: str, folder: Path, code: str = CODE) -> None:
        self._out, self._err = folder / "stdout", folder / "stderr"
        command = [sys.executable, "-P", "-c", code, *arguments]
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=folder,
                env=os.environ | {"COLUMNS": "80"},
            )

    def wait(self, patience: float = PATIENCE) -> Done:
        status = self.process.wait(patience)
        return Done(status, self._out.read_text(), self._err.read_text())

    @property
    def has_ended(self) -> bool:
        """Whether it has run its last instruction; the kernel may then still free its memory, and ignores signals."""
        if self.process.poll() is not None:
            return True
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return bool(int(fields[6]) & PF_EXITING)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def running_worker(
    folder: Path, pool: str, *, convoy: Sequence[str | Path] = CONVOY, **variables: str
) -> Iterator["subprocess.Popen[bytes]"]:
    """A worker of a pool in a folder, whose file `log` has what it says; SIGTERM ends it."""
    with (folder / "log").open("ab") as log:
        worker = subprocess.Popen(
            [*convoy, "worker", "--pool", pool],
            stdout=log,
            stderr=log,
            cwd=folder,
            env=os.environ | variables,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as a script's background job has it
        )
    try:
        yield worker
    finally:
        worker.terminate()
        try:
            worker.wait(60)
        except subprocess.TimeoutExpired:
            worker.kill()
            raise


class Training:
    """The processes of one training, found by the path of its folder in their command lines."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def run_id(self) -> str:
        return self.folder.name

    def processes(self, module: str = "") -> list[psutil.Process]:
        """Those that live; or only those of a module, such as `tasks.training.rank`."""
        found = []
        for process in psutil.process_iter():
            try:
                words = process.cmdline()
                if str(self.folder) in words and process.status() != psutil.STATUS_ZOMBIE:
                    named = words[words.index("-m") + 1] if "-m" in words else ""
                    if RANK_NAME.fullmatch(process.name()):  # forked by torchrun, whose command line it has
                        named = "tasks.training.rank"
                    if module in ("", named):
                        found.append(process)
            except psutil.Error:
                continue
        return found

    def steps(self) -> int:
        """Steps that its ranks have reported."""
        try:
            lines = (self.folder / "events.jsonl").read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return 0
        whole = [line for line in lines if line.endswith(b"\n")]
        return max((int(json.loads(line)["step"]) for line in whole), default=0)

    def reported(self) -> list[int]:
        """The steps of all reports of the flow's last try, in their order."""
        events = [json.loads(line) for line in (self.folder / "events.jsonl").read_bytes().splitlines()]
        return [event["step"] for event in events if event["loss"] is not None]

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank."""
        (found,) = (process for process in self.processes("tasks.training.rank") if process.name() == f"rank-{number}")
        return found

    def comes_to(self, step: int) -> None:
        """Wait until its ranks have come that far."""
        wait_for(lambda: self.steps() >= step, f"step {step}")

    def assert_ends(self) -> None:
        """Wait until no process of it lives."""
        wait_for(lambda: not self.processes(), f"the end of {self.processes()}", ENDS_WITHIN)


def history(run_id: str) -> dict[str, list[tuple[int, float]]]:
    """Returns step and value of each row of each metric in MLflow, except `NOT_EXACT`."""
    client = MlflowClient()
    names = [name for name in client.get_run(run_id).data.metrics if not NOT_EXACT.match(name)]
    return {
        name: sorted((point.step, point.value) for point in client.get_metric_history(run_id, name)) for name in names
    }


def assert_as_undisturbed(found: Summary, undisturbed: Summary) -> None:
    """Checks that a disturbed training ended like an undisturbed one."""
    assert found.status == "done", found.error
    assert found.weights_sha256 == undisturbed.weights_sha256
    assert found.accuracy == undisturbed.accuracy
    assert found.mlflow_run_id and undisturbed.mlflow_run_id
    run = MlflowClient().get_run(found.mlflow_run_id)
    assert run.data.metrics["test/accuracy"] == undisturbed.accuracy
    assert run.info.status == "FINISHED"
    assert run.data.tags["convoy.weights_sha256"] == undisturbed.weights_sha256
    artifacts = MlflowClient().list_artifacts(found.mlflow_run_id, "weights")
    assert [item.path for item in artifacts] == ["weights/model.safetensors"]
    ours, theirs = history(found.mlflow_run_id), history(undisturbed.mlflow_run_id)
    assert ours.keys() == theirs.keys()
    for name, rows in theirs.items():
        steps, expected = [step for step, _ in ours[name]], [step for step, _ in rows]
        assert steps == expected, f"{name}: {difference(steps, expected)}"
        assert ours[name] == rows, name


def difference(found: list[int], expected: list[int]) -> str:
    """Returns missing steps, and steps that are repeated or unexpected."""
    missing = sorted(set(expected) - set(found))
    surplus = sorted(set(found) - set(expected) | {step for step in found if found.count(step) > expected.count(step)})
    return f"missing {missing}, surplus {surplus}"


def flow_run_of(training: Training) -> UUID:
    """Id of the Prefect flow run that started it."""
    return UUID(MlflowClient().get_run(training.run_id).data.tags["prefect.flow_run_id"])


class NextTraining:
    """Finds the training that starts after this object was made."""

    def __init__(self, settings: Settings) -> None:
        self._runs = settings.runs
        self._before = self._folders()

    def _folders(self) -> set[Path]:
        return set(self._runs.iterdir()) if self._runs.exists() else set()

    def starts(self) -> Training:
        """Wait until it is about to start."""
        (folder,) = wait_for(lambda: self._folders() - self._before, "a training to start")
        return Training(folder)

    def under_way(self) -> Training:
        """Wait until its ranks have reported steps twice, so that they certainly train."""
        training = self.starts()
        first = wait_for(training.steps, "the ranks to train")
        wait_for(lambda: training.steps() > first, "the ranks to go on")
        return training
