"""What everything beside training costs: whole commands, as multiples of loading the three large libraries."""

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from PIL import Image

from infra.stack.ports import PORT_RANGE
from tests.bench.comparison import Comparison, Side, compare

TRAIN = ("train", "--dataset", "digits", "--epochs", "3", "--ranks", "2")
REFUSED = 3  # a digits run that is no better than the champion before; it takes as long
USERS_OWN = ("AWS_", "CONVOY_", "MLFLOW_", "PREFECT_", "PYTHONPATH")  # the last has the packages of other benchmarks
COMMANDS = {
    "digits run, 3 epochs, 2 ranks": TRAIN,
    "runs": ("runs",),
    "history": ("history", "digits"),
    "status": ("status",),
    "doctor": ("doctor",),
    "up, warm": ("up",),
    "retrain --wait, nothing to do": ("retrain", "-d", "retrain/digits", "--wait"),
    "predict, ten images": ("predict", "digits", "images", "--out", "table.csv"),
    "export": ("export", "digits", "--format", "pt2", "--out", "digits.pt2"),
}


def overhead(rounds: int) -> Iterator[Comparison]:
    """Commands on warm servers, and a cold start of these, against `import torch, mlflow, prefect` in a process."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        environment = environment_of(folder / "home")
        libraries = Side("import", _timed([sys.executable, "-c", "import torch, mlflow, prefect"], folder, environment))
        with _servers(folder, environment):
            _ready(folder, environment)
            for name, arguments in COMMANDS.items():
                command = _timed(convoy_command(*arguments), folder, environment, (0, REFUSED))
                yield compare(name, Side("convoy", command), libraries, rounds=rounds, unit="s")
        yield compare("up, cold", Side("convoy", _cold_start(folder)), libraries, rounds=rounds, unit="s")


def convoy_command(*arguments: str) -> list[str]:
    """The `convoy` of this environment with arguments."""
    return [str(Path(sys.executable).with_name("convoy")), *arguments]


def environment_of(home: Path) -> dict[str, str]:
    """The environment of commands that use a state folder of their own, and free ports."""
    ports = zip(("S3", "MLFLOW", "PREFECT"), random.sample(PORT_RANGE, 3), strict=True)
    users = {name: value for name, value in os.environ.items() if not name.startswith(USERS_OWN)}
    return users | {"CONVOY_HOME": str(home)} | {f"CONVOY_{name}_PORT": str(port) for name, port in ports}


def run_command(
    command: list[str], folder: Path, environment: dict[str, str], statuses: tuple[int, ...] = (0,)
) -> None:
    """Runs a command in a folder; raises RuntimeError if it ends with another status than these."""
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode not in statuses:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-500:]}")


def _timed(
    command: list[str], folder: Path, environment: dict[str, str], statuses: tuple[int, ...] = (0,)
) -> Callable[[], float]:
    def measure() -> float:
        (folder / "digits.pt2").unlink(missing_ok=True)
        began = time.perf_counter()
        run_command(command, folder, environment, statuses)
        return time.perf_counter() - began

    return measure


@contextmanager
def _servers(folder: Path, environment: dict[str, str]) -> Iterator[None]:
    run_command(convoy_command("up"), folder, environment)
    worker = None
    try:
        deployment = {
            "name": "digits",
            "entrypoint": "flows.retrain.retrain_flow",
            "parameters": {"config": {"dataset": "digits", "epochs": 3, "ranks": 2}},
            "work_pool": {"name": "convoy"},
        }
        (folder / "prefect.yaml").write_text(yaml.safe_dump({"name": "bench", "deployments": [deployment]}))
        run_command(convoy_command("deploy", "--file", "prefect.yaml"), folder, environment)
        with (folder / "worker.log").open("wb") as log:
            worker = subprocess.Popen(convoy_command("worker"), cwd=folder, env=environment, stdout=log, stderr=log)
        yield
    finally:
        if worker:
            worker.terminate()
            worker.wait()
        run_command(convoy_command("down"), folder, environment)


def _ready(folder: Path, environment: dict[str, str]) -> None:
    """Trains the champion that the commands are about, and makes ten images for it."""
    run_command(convoy_command(*TRAIN), folder, environment)
    (folder / "images").mkdir()
    for number in range(10):
        Image.new("L", (8, 8), 20 * number).save(folder / "images" / f"{number}.png")


def _cold_start(folder: Path) -> Callable[[], float]:
    def measure() -> float:
        home = folder / "cold"
        environment = environment_of(home)
        try:
            return _timed(convoy_command("up"), folder, environment)()
        finally:
            run_command(convoy_command("down"), folder, environment)
            shutil.rmtree(home)

    return measure
