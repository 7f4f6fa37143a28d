"""A state folder with its stack, the commands of its user, and one training of a model of its own."""

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from signal import SIGCONT, SIGKILL, Signals
from typing import Any

import psutil
import yaml
from mlflow.tracking import MlflowClient
from prefect.context import refresh_global_settings_context

from infra.settings import Settings
from infra.stack.ports import PORT_RANGE
from infra.stack.state import SERVER_NAMES, ServerName, StackFolder
from infra.storage.object_store import ObjectStore
from tests.flows.program import RESUMABLE, Training, sets

PATIENCE = 900.0  # seconds until a command counts as hanging
TRIES = 4  # of a user to get a training finished
DISKS = {"": 500, "runs": 32, "cache": 64, "tmp": 64}  # MiB, by folder of the state folder
STEPS = 96
UNATTENDED = ("night", "away")  # families whose trainings a worker runs, and nobody helps
CONFIG = sets(*RESUMABLE, "epochs=8", "promote=true")


@dataclass(frozen=True, slots=True)
class Plan:
    """All that is random about a trial: a function of its seed, by `tables.plan`."""

    seed: int
    family: str
    fault: str
    moment: str
    step: int  # of the moment "in training"
    delay: float  # seconds from the moment to the fault
    seconds: float  # that an outage lasts
    ranks: int  # to resume with


class Command(subprocess.Popen[bytes]):
    """One `convoy …`, with its output in a file of a folder."""

    def __init__(self, words: tuple[str, ...], folder: Path, environment: dict[str, str]) -> None:
        self.words, self.hung = words, False
        self.log = folder / f"{len(list(folder.iterdir())):04}-{words[0]}.log"
        command = [sys.executable, "-P", "-c", "from flows.cli import main; main()", *words]
        with self.log.open("wb") as out:
            super().__init__(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, cwd=folder)

    def end(self, patience: float = PATIENCE) -> "Command":
        """Waits for its end; kills it if it hangs."""
        try:
            self.wait(patience)
        except subprocess.TimeoutExpired:
            self.hung = True
            self.kill()
            self.wait()
        return self

    def __str__(self) -> str:
        return f"{self.words[0]} {'hung' if self.hung else self.returncode}"


class Home:
    """A state folder with its servers, and `convoy` as its user runs it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tmp, self.output = folder / ".convoy", folder / ".convoy" / "tmp", folder / "output"
        self.disks: list[Path] = []
        for path, size in ((self.folder / name, size) for name, size in DISKS.items()):
            path.mkdir(parents=True, exist_ok=True)
            if os.geteuid() == 0:
                subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", str(path)], check=True)
                self.disks.append(path)
        self.output.mkdir()
        ports = {f"CONVOY_{name}_PORT": str(random.choice(PORT_RANGE)) for name in ("S3", "MLFLOW", "PREFECT")}
        here = {"CONVOY_HOME": str(self.folder), "TMPDIR": str(self.tmp), "COLUMNS": "80", "CONVOY_SWEEP_SECONDS": "5"}
        self._before = dict(os.environ)
        self._user = os.environ | ports | here
        self.settings = Settings(home=self.folder)
        self.reference = ""  # MLflow run of the undisturbed training

    def start(self, *words: str) -> Command:
        return Command(words, self.output, self._user)

    def up(self) -> None:
        """Has the servers running, and the clients of this process know them."""
        done = self.start("up").end()
        assert done.returncode == 0, done.log.read_text()
        os.environ.update(StackFolder(self.settings).endpoints().environment())
        refresh_global_settings_context()

    def servers(self, *names: ServerName) -> set[psutil.Process]:
        folder = StackFolder(self.settings)
        return {process for name in names for process in folder.members(name)}

    def others(self) -> list[psutil.Process]:
        """Returns all processes of this state folder that are no servers."""
        found, servers = [], self.servers(*SERVER_NAMES)
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
        send(SIGKILL, others := self.others())
        psutil.wait_procs(others)
        for path in (path for name in DISKS if name for path in (self.folder / name).iterdir()):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def close(self) -> None:
        send(SIGKILL, self.others())
        send(SIGCONT, self.servers(*SERVER_NAMES))
        self.start("down").end()
        for disk in reversed(self.disks):
            subprocess.run(["umount", "--lazy", str(disk)], check=True)
        os.environ.clear()  # else the next home would take this one's servers for external ones
        os.environ.update(self._before)
        refresh_global_settings_context()


class Trial:
    """A training of a model of its own, and what becomes of it.

    Attributes:
        commands: what the user called, the training itself first.
        late: whether the training ended before the fault.
        killed: whether processes had no chance to tidy up.
        noticed: what a fault's own commands complained of.
    """

    def __init__(self, home: Home, plan: Plan) -> None:
        self.home, self.plan, self.name, self.began = home, plan, f"trial-{plan.seed}", datetime.now(UTC)
        self.commands: list[Command] = []
        self.noticed: list[str] = []
        self.late = self.killed = False

    @property
    def training(self) -> Training | None:
        return next((Training(path) for path in self.home.settings.runs.iterdir() if path.is_dir()), None)

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

    def send(self, sent: Signals, processes: Iterable[psutil.Process]) -> None:
        self.killed |= sent == SIGKILL
        send(sent, processes)

    def start(self, *options: str) -> None:
        """Starts the training, here or by a worker; `options` are further ones of `retrain`."""
        if self.plan.family not in ("worker", *UNATTENDED):
            self.train(2)
            return
        config = {"dataset": "digits", "name": self.name, "ranks": 2}
        deployment = {"name": self.name, "entrypoint": "flows.retrain.retrain_flow", "work_pool": {"name": "campaign"}}
        file = self.home.output / "prefect.yaml"
        deployments = [deployment | {"parameters": {"config": config}}]
        file.write_text(yaml.safe_dump({"name": "convoy", "pull": [], "deployments": deployments}))
        self.home.start("deploy", "--file", str(file)).end()
        self.start_worker()
        self.call("retrain", "-d", f"retrain/{self.name}", "--force", "--wait", *CONFIG, *options)

    def start_worker(self) -> None:
        self.worker = self.home.start("worker", "--pool", "campaign")

    def train(self, ranks: int) -> Command:
        return self.call("train", "--dataset", "digits", "--name", self.name, "--ranks", str(ranks), *CONFIG)

    def resume(self, *options: str) -> Command:
        return self.call("resume", self.runs()[0].info.run_id, *options)

    def call(self, *words: str) -> Command:
        self.commands.append(self.home.start(*words))
        return self.commands[-1]

    def comes_to(self, moment: Callable[["Trial"], object]) -> None:
        """Waits until it can be seen that the moment has come, and then as long as the plan says."""
        deadline = time.monotonic() + PATIENCE
        while not moment(self) and self.commands[0].poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(self.plan.delay)
        self.late = self.commands[0].poll() is not None

    def recover(self) -> None:
        """Does what a user would do: looks how it ended, starts the servers, resumes or trains again, and tidies up."""
        by_worker = self.plan.family == "worker"
        if by_worker and not self.late:
            self.worker.end(180)
            self.start_worker()  # which settles what the first one has left
        last = [command.end() for command in self.commands][-1]
        self.home.up()
        for _ in range(TRIES):
            if self.finished():
                break
            again = self.runs() and not (last.words[0] == "resume" and last.returncode == 2)
            last = (self.resume("--ranks", str(self.plan.ranks)) if again else self.train(self.plan.ranks)).end()
            self.home.up()
        if by_worker:
            self.worker.terminate()
            self.noticed += [str(self.worker)] if self.worker.end(180).hung else []
        self.call("doctor", "--fix").end()


def send(sent: Signals, processes: Iterable[psutil.Process]) -> None:
    """Sends a signal to those that still live."""
    for process in processes:
        with suppress(psutil.Error):
            process.send_signal(sent)
