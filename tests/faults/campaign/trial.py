"""A state folder with its stack, the commands of its user, and one training of a model of its own."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import yaml
from mlflow.tracking import MlflowClient
from prefect.context import refresh_global_settings_context

from infra.objectstore import ObjectStore
from infra.ports import CHOICE
from infra.settings import Settings
from infra.stackfolder import NAMES, ServerName, StackFolder
from tests.flows.program import RESUMABLE, Training, sets

PATIENCE = 300.0  # seconds until a command counts as hanging
TRIES = 4  # of a user to get a training finished
DISKS = {"": 1500, "runs": 32, "cache": 64, "tmp": 64}  # MiB, by folder of the state folder
POOL = "campaign"
CONFIG = sets(*RESUMABLE, "promote=true")


@dataclass(frozen=True, slots=True)
class Plan:
    """All that is random about a trial: a function of its seed, by `tables.plan`.

    Attributes:
        step: of the moment "in training".
        delay: seconds from the moment to the fault.
        seconds: that an outage lasts.
        ranks: to resume with.
    """

    seed: int
    family: str
    fault: str
    moment: str
    step: int
    delay: float
    seconds: float
    ranks: int


class Command:
    """One `convoy …`, with its output in a file."""

    def __init__(self, arguments: tuple[str, ...], log: Path, environment: dict[str, str]) -> None:
        self.arguments, self._log, self.hung = arguments, log, False
        command = [sys.executable, "-P", "-c", "from flows.cli import main; main()", *arguments]
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, cwd=log.parent
            )

    def wait(self, patience: float = PATIENCE) -> "Command":
        """Waits for its end; kills it if it hangs."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(patience)
        if self.status is None:
            self.hung = True
            self.process.kill()
            self.process.wait()
        return self

    @property
    def status(self) -> int | None:
        return self.process.poll()

    @property
    def text(self) -> str:
        return self._log.read_text(errors="replace")

    def __str__(self) -> str:
        return f"{self.arguments[0]} {'hung' if self.hung else self.status}"


class Home:
    """A state folder with its servers, and `convoy` as its user runs it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tmp, self.output = folder / ".convoy", folder / ".convoy" / "tmp", folder / "output"
        self.disks: list[Path] = []
        for name, size in DISKS.items():
            (path := self.folder / name).mkdir(parents=True, exist_ok=True)
            if os.geteuid() == 0:
                subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", str(path)], check=True)
                self.disks.append(path)
        self.output.mkdir()
        self._user = os.environ | {"CONVOY_HOME": str(self.folder), "TMPDIR": str(self.tmp), "COLUMNS": "80"}
        for name in ("S3", "MLFLOW", "PREFECT"):  # the default ports are for the user's own stack
            self._user[f"CONVOY_{name}_PORT"] = str(random.choice(CHOICE))
        self.settings = Settings(home=self.folder)
        self.reference = ""  # MLflow run of the undisturbed training
        self.known_open: set[UUID] = set()  # flow runs that an earlier trial has left open

    def start(self, *arguments: str) -> Command:
        number = len(list(self.output.iterdir()))
        return Command(arguments, self.output / f"{number:04}-{arguments[0]}.log", self._user)

    def run(self, *arguments: str) -> Command:
        return self.start(*arguments).wait()

    def up(self) -> None:
        """Has the servers running, and the clients of this process know them."""
        done = self.run("up")
        assert done.status == 0, done.text
        os.environ.update(StackFolder(self.settings).endpoints().environment())
        refresh_global_settings_context()

    def servers(self, *names: ServerName) -> set[psutil.Process]:
        folder = StackFolder(self.settings)
        return {process for name in names for process in folder.members(name)}

    def others(self) -> list[psutil.Process]:
        """All processes of this state folder that are no servers."""
        found, servers = [], self.servers(*NAMES)
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                ours = process.environ().get("CONVOY_HOME") == str(self.folder)
                if ours and process not in servers and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def store(self) -> ObjectStore:
        return ObjectStore.connect(self.settings.bucket)

    def clean(self) -> None:
        """Takes away what a trial has left, so that the next one stands for itself."""
        send(signal.SIGKILL, self.others())
        for path in [*self.tmp.iterdir(), *(self.folder / "cache").iterdir()]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def close(self) -> None:
        send(signal.SIGKILL, self.others())
        send(signal.SIGCONT, self.servers(*NAMES))
        self.run("down")
        for disk in reversed(self.disks):
            subprocess.run(["umount", "--lazy", str(disk)], check=True)


class Trial:
    """A training of a model of its own, and what becomes of it.

    Attributes:
        commands: what the user called, the training itself first.
        late: whether the training ended before the fault.
        killed: whether processes had no chance to tidy up.
        noticed: what a fault's own commands complained of.
    """

    def __init__(self, home: Home, plan: Plan) -> None:
        self.home, self.plan = home, plan
        self.name = f"trial-{plan.seed}"
        self.commands: list[Command] = []
        self.late = self.killed = False
        self.noticed: list[str] = []
        self._before = set(home.settings.runs.iterdir())

    @property
    def training(self) -> Training | None:
        folders = [path for path in self.home.settings.runs.iterdir() if path.is_dir() and path not in self._before]
        return Training(folders[0]) if folders else None

    def steps(self) -> int:
        return self.training.steps() if self.training else 0

    def runs(self) -> list[Any]:
        """Returns its MLflow runs, the newest first."""
        client = MlflowClient()
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        return list(client.search_runs(experiments, f"tags.`convoy.model` = '{self.name}'"))

    def finished(self) -> str:
        """Returns the id of its finished run, or nothing."""
        return next((run.info.run_id for run in self.runs() if run.info.status == "FINISHED"), "")

    def versions(self) -> list[Any]:
        return list(MlflowClient().search_model_versions(f"name = '{self.name}'"))

    def send(self, sent: signal.Signals, processes: Iterable[psutil.Process]) -> None:
        self.killed |= sent == signal.SIGKILL
        send(sent, processes)

    def start(self) -> None:
        """Starts the training, here or by a worker."""
        if self.plan.family != "worker":
            self.train(2)
            return
        config = {"dataset": "digits", "name": self.name, "ranks": 2}
        deployment = {"name": self.name, "entrypoint": "flows.retrain.retrain_flow", "work_pool": {"name": POOL}}
        file = self.home.output / "prefect.yaml"
        deployments = [deployment | {"parameters": {"config": config}}]
        file.write_text(yaml.safe_dump({"name": "convoy", "pull": [], "deployments": deployments}))
        self.home.run("deploy", "--file", str(file))
        self._start_worker()
        self._call("retrain", "-d", f"retrain/{self.name}", "--force", "--wait", *CONFIG)

    def train(self, ranks: int) -> None:
        self._call("train", "--dataset", "digits", "--name", self.name, "--ranks", str(ranks), *CONFIG)

    def resume(self, *options: str) -> None:
        self._call("resume", self.runs()[0].info.run_id, *options)

    def comes_to(self, moment: Any) -> None:
        """Waits until it can be seen that the moment has come, and then as long as the plan says."""
        deadline = time.monotonic() + PATIENCE
        while not moment(self) and self.commands[0].status is None and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(self.plan.delay)
        self.late = self.commands[0].status is not None

    def recover(self) -> None:
        """Does what a user would do: looks how it ended, starts the servers, resumes or trains again, and tidies up."""
        if self.plan.family == "worker" and not self.late:
            self.worker.wait(60)
            self._start_worker()  # which settles what the first one has left
        for command in self.commands:
            command.wait()
        for _ in range(TRIES):
            self.home.up()
            if self.finished():
                break
            if self.runs() and not (self.commands[-1].arguments[0] == "resume" and self.commands[-1].status == 2):
                self.resume("--ranks", str(self.plan.ranks))
            else:
                self.train(self.plan.ranks)
            self.commands[-1].wait()
        if self.plan.family == "worker":
            self.worker.process.terminate()
            self.noticed += [str(self.worker)] if self.worker.wait(60).hung else []
        self._call("doctor", "--fix")
        self.commands[-1].wait()

    def _start_worker(self) -> None:
        self.worker = self.home.start("worker", "--pool", POOL)

    def _call(self, *arguments: str) -> None:
        self.commands.append(self.home.start(*arguments))


def send(sent: signal.Signals, processes: Iterable[psutil.Process]) -> None:
    """Sends a signal to those that still live."""
    for process in processes:
        with suppress(psutil.Error):
            process.send_signal(sent)
