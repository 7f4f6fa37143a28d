"""Fixtures and helpers for tests of the local stack."""

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from infra.settings import Settings
from infra.stack.endpoints import Endpoints
from infra.stack.local_stack import ServerStatus, down, status
from infra.stack.ports import PORT_RANGE
from infra.stack.state import SERVER_NAMES, ServerName, StackFolder

REPOSITORY = Path(__file__).parents[2]
S3: list[ServerName] = ["seaweedfs"]


@pytest.fixture
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes the variables of the session's stack, so that a test's `Settings` mean local servers."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "CONVOY_", "MLFLOW_", "PREFECT_")):
            monkeypatch.delenv(name)


@pytest.fixture
def own(own_environment: None, tmp_path: Path) -> Iterator[Settings]:
    """Settings of the test's own stack, which is stopped after the test."""
    s3, mlflow = random.sample(PORT_RANGE, 2)
    settings = Settings(home=tmp_path / ".convoy", s3_port=s3, mlflow_port=mlflow)
    yield settings
    down(settings)
    assert not any(StackFolder(settings).members(name) for name in SERVER_NAMES)


def state_of(settings: Settings, name: str = "seaweedfs") -> ServerStatus:
    return next(server for server in status(settings) if server.name == name)


def pids(settings: Settings) -> dict[str, int | None]:
    return {server.name: server.pid for server in status(settings)}


def use(endpoints: Endpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in endpoints.environment().items():
        monkeypatch.setenv(name, value)


def run_up(settings: Settings) -> "subprocess.Popen[str]":
    program = (
        "import sys; from infra.settings import Settings; from infra.stack.local_stack import up; "
        "up(Settings(home=sys.argv[1], s3_port=sys.argv[2]), only=['seaweedfs'])"
    )
    command = [sys.executable, "-c", program, str(settings.home), str(settings.s3_port)]
    return subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]
