"""The local stack's part of the state folder, and the servers' definitions and addresses that follow from it."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, get_args

import psutil

from infra.errors import UsageError
from infra.machine.files import write_if_changed
from infra.machine.locks import is_held, locked
from infra.settings import DEFAULT_HOME, Settings
from infra.stack import ports, processes, servers
from infra.stack.credentials import Credentials, ensure_certificate, load_or_create
from infra.stack.endpoints import Endpoints
from infra.stack.processes import Server, StartRecord

ServerName = Literal["seaweedfs", "mlflow", "prefect"]
SERVER_NAMES: tuple[ServerName, ...] = get_args(ServerName)
HEALTH_PATHS: dict[ServerName, str] = {"seaweedfs": "/healthz", "mlflow": "/health", "prefect": "/api/health"}


class StackFolder:
    """The folder `<home>/stack`: credentials, certificate, ports, and a record of each server's start.

    Raises:
        UsageError: this user cannot read or write it.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.root = settings.home / "stack"
        self._certificate, self._key = self.root / "certificate.pem", self.root / "key.pem"
        if os.path.isdir(self.root) and not os.access(self.root, os.R_OK | os.W_OK | os.X_OK):
            raise UsageError(
                f"{self.root} is another user's, or closed; set CONVOY_HOME to a folder of yours, "
                "or name their servers (MLFLOW_TRACKING_URI, …)"
            )
        self.ports = self._read_ports()

    @contextmanager
    def locked(self, on_event: Callable[[str], None] = lambda event: None) -> Iterator[None]:
        """Keeps other commands from starting or stopping servers; the kernel releases the lock of a killed command."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if is_held(self.root / "lock"):
            on_event("another command is starting or stopping the servers: waiting for it")
        with locked(self.root / "lock"):
            self.ports = self._read_ports()
            yield

    def prepare(self, on_event: Callable[[str], None]) -> None:
        """Creates missing credentials, and chooses ports; those of running servers do not change."""
        self._make_private()
        ensure_certificate(self._certificate, self._key)
        write_if_changed(self.root / "aws-config", "[default]\n")
        kept: list[str] = []
        for name in SERVER_NAMES:
            if (record := self.record(name)) and record.process(self.mark(name)):
                kept.extend(ports.SEAWEEDFS if name == "seaweedfs" else [name])
            else:
                processes.stop(partial(self.members, name))  # processes that a killed server left
        asked = {
            "s3": self.settings.s3_port,
            "mlflow": self.settings.mlflow_port,
            "prefect": self.settings.prefect_port,
        }
        preferred = {name: port for name, port in asked.items() if port}
        self.ports = ports.choose(self.ports, kept=kept, preferred=preferred)
        for purpose, port in preferred.items():
            if purpose not in kept and port != getattr(self.ports, purpose):
                listens = ports.is_listened_on(port)
                why = "another program has it" if listens else "an outgoing connection of this machine has it now"
                on_event(f"port {port} is not used for {purpose}: {why}")
        write_if_changed(self.root / "ports.json", self.ports.model_dump_json())

    def _make_private(self) -> None:
        """Closes the data to other users of the machine, and to git: cached files are as confidential as their source.

        A state folder that the user has named may hold other files, or be shared on purpose. So the state folder itself
        is closed only if it has the default name.
        """
        private = [self.settings.cache, self.settings.runs, self.settings.logs]
        if self.settings.home.name == DEFAULT_HOME:
            private.append(self.settings.home)
        for folder in private:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not folder.is_symlink():  # a link may lead to a shared folder
                with suppress(OSError):  # the folder is another user's, or on a disk without modes
                    folder.chmod(0o700)
        ignored = self.settings.home / ".gitignore"
        if self.settings.home in private and not ignored.exists():
            ignored.write_text("*\n")

    def external(self) -> list[tuple[ServerName, str, str]]:
        """Returns the external servers in place of local ones: name, the variable that names it, address."""
        candidates: tuple[tuple[ServerName, str, str | None], ...] = (
            ("seaweedfs", "AWS_ENDPOINT_URL", self.settings.s3_url),
            ("mlflow", "MLFLOW_TRACKING_URI", self.settings.mlflow_uri),
            ("prefect", "PREFECT_API_URL", self.settings.prefect_api_url),
        )
        return [(name, variable, address) for name, variable, address in candidates if address]

    def record_file(self, name: ServerName) -> Path:
        """Returns the file with the record of a server's last start."""
        return self.root / f"{name}.json"

    def record(self, name: ServerName) -> StartRecord | None:
        """Returns the record of a server's last start, or None if it was never started or was stopped."""
        return StartRecord.from_file(self.record_file(name))

    def log(self, name: ServerName) -> Path:
        """Returns the log of a server's last start."""
        return self.settings.logs / f"{name}.log"

    def mark(self, name: ServerName) -> str:
        """Returns the mark in the environment of a server's processes."""
        return f"{name}@{os.path.realpath(self.settings.home)}"

    def members(self, name: ServerName) -> set[psutil.Process]:
        """Returns the living processes of a server."""
        return processes.members(self.mark(name), self.record(name))

    def port(self, name: ServerName) -> int:
        """Returns the port for a local server's clients."""
        return {"seaweedfs": self.ports.s3, "mlflow": self.ports.mlflow, "prefect": self.ports.prefect}[name]

    def url(self, name: ServerName) -> str:
        """Returns the address of a local server."""
        return f"http://{servers.HOST}:{self.port(name)}"

    def server(self, name: ServerName) -> Server:
        """Returns the definition of a local server on the chosen ports."""
        if name == "seaweedfs":
            return servers.seaweedfs(self.settings, self.ports, self.credentials, self._certificate, self._key)
        if name == "mlflow":
            return servers.mlflow(self.settings, self.ports, self.endpoints().s3_environment())
        return servers.prefect(self.settings, self.ports)

    def endpoints(self) -> Endpoints:
        """Returns the addresses for clients, local or external."""
        settings = self.settings
        api = settings.prefect_api_url
        ui = api.removesuffix("/api") if api else self.url("prefect")
        return Endpoints(
            home=settings.home,
            bucket=settings.bucket,
            s3_endpoint_url=settings.s3_url or self.url("seaweedfs"),
            s3_access_key_id=None if settings.s3_url else self.credentials.access_key_id,
            s3_secret_access_key=None if settings.s3_url else self.credentials.secret_access_key,
            mlflow_tracking_uri=settings.mlflow_uri or self.url("mlflow"),
            mlflow_is_local=settings.mlflow_uri is None,
            prefect_api_url=api or f"{self.url('prefect')}/api",
            prefect_ui_url=settings.prefect_ui_url or ui,
            prefect_is_local=api is None,
        )

    @cached_property
    def credentials(self) -> Credentials:
        """The local object store's keys; created at first use, so hold the lock when you read them first."""
        return load_or_create(self.root / "credentials.json")

    def _read_ports(self) -> ports.Ports:
        return ports.Ports.from_file(self.root / "ports.json") or ports.Ports()
