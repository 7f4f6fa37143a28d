"""Commands and servers of Convoy for benchmarks, apart from the user's: a state folder of their own, and free ports."""

import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from infra.settings import Settings
from infra.stack.local_stack import down, up
from infra.stack.ports import PORT_RANGE

REFUSED = 3  # what a training ends with that is no better than the champion; it takes as long
USERS_OWN = ("AWS_", "CONVOY_", "MLFLOW_", "PREFECT_", "PYTHONPATH")  # the last has the packages of other benchmarks


@contextmanager
def convoy_servers() -> Iterator[tuple[Path, dict[str, str]]]:
    """Servers for as long as it lasts; the folder that commands run in, and the environment that names the servers."""
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = Path(temporary)
        environment = environment_of(folder / "home")
        run_command(convoy_command("up"), folder, environment)
        try:
            yield folder, environment
        finally:
            run_command(convoy_command("down"), folder, environment)


@contextmanager
def object_store() -> Iterator[Settings]:
    """An object store that `os.environ` names for as long as it lasts."""
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary, patch.dict(os.environ):
        settings = Settings(home=Path(temporary) / ".convoy")
        try:
            os.environ.update(up(settings, only=["seaweedfs"]).environment())
            yield settings
        finally:
            down(settings)


def convoy_command(*arguments: str) -> list[str]:
    """The `convoy` of this environment with arguments."""
    return [str(Path(sys.executable).with_name("convoy")), *arguments]


def environment_of(home: Path) -> dict[str, str]:
    """The environment of commands that use a state folder of their own, and free ports."""
    ports = zip(("S3", "MLFLOW", "PREFECT"), random.sample(PORT_RANGE, 3), strict=True)
    users = {name: value for name, value in os.environ.items() if not name.startswith(USERS_OWN)}
    return users | {"CONVOY_HOME": str(home)} | {f"CONVOY_{name}_PORT": str(port) for name, port in ports}


def run_command(command: list[str], folder: Path, environment: dict[str, str], statuses: tuple[int, ...] = (0,)) -> str:
    """Runs a command in a folder; returns what it prints.

    Raises:
        RuntimeError: it ends with another status than these.
    """
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode not in statuses:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-500:]}")
    return done.stdout
