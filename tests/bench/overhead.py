"""What everything beside training costs: whole commands, as multiples of loading the three large libraries."""

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

from tests.bench.comparison import Comparison, Side, compare
from tests.bench.servers import REFUSED, convoy_command, convoy_servers, environment_of, run_command

TRAIN = ("train", "--dataset", "digits", "--epochs", "3", "--ranks", "2")
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
    program = [sys.executable, "-c", "import torch, mlflow, prefect"]
    with convoy_servers() as (folder, environment), _worker(folder, environment):
        libraries = Side("import", _timed(program, folder, environment))
        _ready(folder, environment)
        for name, arguments in COMMANDS.items():
            command = _timed(convoy_command(*arguments), folder, environment, (0, REFUSED))
            yield compare(name, Side("convoy", command), libraries, rounds=rounds, unit="s")
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        libraries = Side("import", _timed(program, Path(temporary), environment))
        yield compare("up, cold", Side("convoy", _cold_start(Path(temporary))), libraries, rounds=rounds, unit="s")


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
def _worker(folder: Path, environment: dict[str, str]) -> Iterator[None]:
    """A worker of a deployment that retrains digits."""
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
    try:
        yield
    finally:
        worker.terminate()
        worker.wait()


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
