"""The services of infra/compose.yaml as processes of this machine: the commands, flags and variables that it names.

Only what has to differ without containers is changed: names of services become 127.0.0.1, ports become free ones, and
folders of the image become this repository and a temporary folder.
"""

import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import yaml

from infra.health_check import answers
from infra.stack import processes
from infra.stack.ports import PORT_RANGE, is_free
from infra.stack.processes import Server
from infra.team_secrets import CLIENT, SERVICES, make

REPOSITORY = Path(__file__).parents[2]
COMPOSE = REPOSITORY / "infra" / "compose.yaml"
PORTS = {"postgres": 5432, "seaweedfs": 8333, "mlflow": 5000, "prefect": 4200}
HEALTH = {"seaweedfs": "/healthz", "mlflow": "/health", "prefect": "/api/health"}
USERS_OWN = ("AWS_", "CONVOY_", "MLFLOW_", "PG", "PREFECT_", "WEED_")
SEAWEEDFS_PORTS = (
    "-s3.port.grpc",
    *(f"-{part}.{kind}" for part in ("master", "volume", "filer") for kind in ("port", "port.grpc")),
)
"""Ports that would be private to a container."""

PATIENCE = 120.0  # seconds for a server to start
VARIABLE = re.compile(r"\$\{(\w+)(?::([?-])([^}]*))?\}")


def compose(variables: Mapping[str, str]) -> dict[str, Any]:
    """The file with its `${…}` filled in, as Compose does.

    Raises:
        KeyError: a variable is needed and not there; the message is the file's own.
    """

    def value(match: re.Match[str]) -> str:
        name, kind, text = match.groups()
        if found := variables.get(name):
            return found
        if kind == "-":
            return str(text)
        raise KeyError(text or name)

    return dict(yaml.safe_load(VARIABLE.sub(value, COMPOSE.read_text())))


def variables_of(file: Path) -> dict[str, str]:
    """Returns the variables that an env file sets."""
    return dict(line.split("=", 1) for line in file.read_text().splitlines())


class Team:
    """All services, in one temporary folder; `stop` ends what was started."""

    def __init__(self, folder: Path) -> None:
        make(folder)
        self.folder = folder
        self.ports = dict(zip(PORTS, _free_ports(len(PORTS)), strict=True))
        self.secrets = variables_of(folder / SERVICES)
        self.services = compose(self.secrets)["services"]
        self.client = {name: self.here(value, "worker") for name, value in variables_of(folder / CLIENT).items()}
        self._started: list[str] = []

    def here(self, text: str, service: str) -> str:
        """Returns a command's word, or a variable's value, with addresses and paths of this machine."""
        for name, port in PORTS.items():
            for host in (name, "127.0.0.1", "localhost"):
                text = text.replace(f"{host}:{port}", f"127.0.0.1:{self.ports[name]}")
            text = text.replace(f"port={port}", f"port={self.ports[name]}")
        text = text.replace("0.0.0.0", "127.0.0.1")
        volume = next((v for v in self.services[service].get("volumes", ()) if v.endswith(":/data")), service)
        folders = {
            "tmp": f"{self.folder}/{service}-tmp",
            "data": f"{self.folder}/{volume.partition(':')[0]}",
            "opt/convoy": str(REPOSITORY),
        }
        return re.sub(r"(?<![\w/])/(tmp|data|opt/convoy)\b", lambda found: folders[found[1]], text)

    def environment(self, service: str) -> dict[str, str]:
        """Returns the variables that the file sets for a service."""
        there = self.services[service].get("environment", {})
        variables = {name: self.here(str(value), service) for name, value in there.items()}
        if file := variables.get("MLFLOW_AUTH_CONFIG_PATH"):  # this file has an address too
            mine = self.folder / "mlflow-auth.ini"
            mine.write_text(self.here(Path(file).read_text(), service))
            variables["MLFLOW_AUTH_CONFIG_PATH"] = str(mine)
        return variables

    def command(self, service: str) -> list[str]:
        """Returns the service's command in the file, with the programs of this Python environment."""
        program, *rest = (self.here(word, service) for word in self.services[service]["command"])
        if program == "convoy":
            return [sys.executable, "-P", "-c", "from flows.cli import main; main()", *rest]
        beside = Path(sys.executable).with_name(program)
        return [str(beside) if beside.exists() else program, *rest]

    def log(self, service: str) -> Path:
        """Returns the log of a service."""
        return self.folder / "logs" / f"{service}.log"

    def members(self, service: str) -> set[psutil.Process]:
        """Returns the living processes of a service."""
        return processes.members(self._mark(service), None)

    def run(self, service: str) -> None:
        """Runs a service that ends by itself, and waits for it."""
        (self.folder / service).mkdir(exist_ok=True)
        done = subprocess.run(
            self.command(service),
            env=_environment() | self.environment(service) | {"CONVOY_HOME": str(self.folder / service)},
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self, service: str, *more: str) -> None:
        """Starts a server, with additional arguments such as further ports."""
        self._start(service, [*self.command(service), *more], self.environment(service))

    def start_all(self, postgres: Path) -> None:
        """Starts all except the worker, in the order of the file; returns when they are healthy.

        Args:
            postgres: folder of PostgreSQL's programs.
        """
        self.start_postgres(postgres)
        self.run("certificate")
        self.start("seaweedfs", *map("{}={}".format, SEAWEEDFS_PORTS, _free_ports(len(SEAWEEDFS_PORTS))))
        self.fill_postgres()
        self.wait_for("seaweedfs")
        for service in ("mlflow", "prefect"):
            self.start(service)
        for service in ("mlflow", "prefect"):
            self.wait_for(service)
        self.run("deploy")

    def start_postgres(self, programs: Path) -> None:
        """Does what PostgreSQL's image does for an empty volume: creates a cluster, then runs databases.sql."""
        data, password = self.folder / "postgres", self.folder / "password"
        method = self.environment("postgres")["POSTGRES_HOST_AUTH_METHOD"]
        data.mkdir(mode=0o700)
        password.write_text(self.secrets["POSTGRES_PASSWORD"])
        as_user: list[str] = []
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups"]
            for path in (data, password):
                shutil.chown(path, "postgres", "postgres")
        initdb = [programs / "initdb", "--username=postgres", f"--auth={method}", f"--pwfile={password}", "-D", data]
        subprocess.run([*as_user, *initdb], check=True, capture_output=True, cwd="/")
        password.unlink()
        port = self.ports["postgres"]
        listen = ("-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={data}", "-p", str(port))
        self._start("postgres", [*as_user, str(programs / "postgres"), "-D", str(data), *listen], {})

    def fill_postgres(self) -> None:
        """Runs databases.sql."""
        environment = self._login("postgres", self.secrets["POSTGRES_PASSWORD"]) | self.environment("postgres")
        self._wait("postgres", lambda: subprocess.run(["pg_isready", "--quiet"], env=environment).returncode == 0)
        script = COMPOSE.with_name("databases.sql")
        subprocess.run(["psql", "--no-psqlrc", "--quiet", "--file", script], env=environment, check=True)

    def ask_postgres(
        self, database: str, question: str, user: str = "postgres", password: str | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """Returns psql's output for a query."""
        password = self.secrets["POSTGRES_PASSWORD"] if password is None else password
        command = [
            "psql",
            "--no-psqlrc",
            "--no-password",
            "--tuples-only",
            "--no-align",
            "--command",
            question,
            database,
        ]
        return subprocess.run(command, env=self._login(user, password), capture_output=True, text=True)

    def wait_for(self, service: str) -> None:
        """Returns when a service is healthy."""
        url = f"http://127.0.0.1:{self.ports[service]}{HEALTH[service]}"
        self._wait(service, lambda: answers(url))

    def stop(self) -> None:
        """Ends all services that were started, the databases last."""
        for service in reversed(self._started):
            processes.stop(partial(self.members, service))

    def _start(self, service: str, command: list[str], environment: dict[str, str]) -> None:
        (self.folder / f"{service}-tmp").mkdir()
        server = Server(
            command=tuple(command),
            environment=environment | {"PYTHONPATH": str(REPOSITORY)},
            not_inherited=USERS_OWN,
            folder=self.folder / service,
            log=self.log(service),
            ports=(),
        )
        self._started.append(service)
        processes.start(server, self._mark(service), self.folder / f"{service}.json")

    def _wait(self, service: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not ready():
            alive = self.members(service) and time.monotonic() < deadline
            assert alive, f"{service} did not start: {processes.log_end(self.log(service))}"
            time.sleep(0.1)

    def _login(self, user: str, password: str) -> dict[str, str]:
        port = str(self.ports["postgres"])
        return _environment() | {"PGHOST": "127.0.0.1", "PGPORT": port, "PGUSER": user, "PGPASSWORD": password}

    def _mark(self, service: str) -> str:
        return f"{service}@{self.folder}"


def _environment() -> dict[str, str]:
    """Returns this process's environment without the variables that name other servers."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(USERS_OWN)}
    return kept | {"PYTHONPATH": str(REPOSITORY)}


def _free_ports(count: int) -> list[int]:
    candidates = random.SystemRandom().sample(PORT_RANGE, 200)
    return [port for port in candidates if is_free(port)][:count]
