"""A power cut during a training: server and holder of the model's lease are killed, and the next one gets the lease."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from infra.settings import Settings
from infra.stack.ports import PORT_RANGE, Ports, is_free
from infra.stack.servers import prefect
from tests.flows.program import wait_for

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

LEASE_STORAGE = "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"
TAKE = """
import sys
from prefect import flow
from tasks.orchestration.flow_runs import flow_is_alive
from tasks.orchestration.model_lease import model_lease
@flow(name="train")
def train():
    with flow_is_alive(), model_lease("cut"):
        print("held", flush=True)
        sys.stdin.read()
train()
"""


class Prefect:
    """A server of Prefect, with its data in a folder."""

    def __init__(self, folder: Path, storage: str) -> None:
        port = next(port for port in random.sample(PORT_RANGE, 200) if is_free(port))
        server = prefect(Settings(home=folder), Ports(prefect=port))
        self.api = server.environment["PREFECT_API_URL"]
        self._command = server.command
        self._environment = os.environ | server.environment | {LEASE_STORAGE: storage}
        self._log = (folder / "log").open("wb")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command, env=self._environment, stdout=self._log, stderr=self._log, start_new_session=True
        )

        def answers() -> bool:
            try:
                return httpx.get(f"{self.api}/health", trust_env=False).is_success
            except httpx.HTTPError:
                return False

        wait_for(answers, "Prefect")

    def kill(self) -> None:
        if self._process:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@pytest.fixture
def server(storage: str, tmp_path: Path) -> Iterator[Prefect]:
    server = Prefect(tmp_path, f"prefect.server.concurrency.lease_storage.{storage}")
    server.start()
    yield server
    server.kill()


@pytest.mark.parametrize(
    ("storage", "next_machine"), [("filesystem", "same"), ("memory", "same"), ("filesystem", "another")]
)
def test_after_a_power_cut_the_next_training_gets_the_lease_within_two_minutes(
    server: Prefect, next_machine: str, tmp_path: Path
) -> None:
    processes: list[subprocess.Popen[str]] = []

    def take(machine: str) -> "subprocess.Popen[str]":
        environment = os.environ | {"PREFECT_API_URL": server.api, "CONVOY_HOME": str(tmp_path / machine)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        processes.append(subprocess.Popen([sys.executable, "-c", TAKE], env=environment, text=True, **pipes))
        return processes[-1]

    try:
        first = take("same")
        assert first.stdout and first.stdout.readline() == "held\n"
        first.kill()
        server.kill()
        server.start()
        begun = time.monotonic()
        second = take(next_machine)
        assert second.stdout and second.stdout.readline() == "held\n"
        assert time.monotonic() - begun < 120
    finally:
        for process in processes:
            process.kill()
            process.communicate()
