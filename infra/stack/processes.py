"""Server processes that outlive the command that started them: start, find again, stop with all children.

A server is found by two independent signs. Its record in the state folder holds its process id and the time
at which that process was created, so an id that the system has since given to another process is never
mistaken for it. And a server, with all that it starts, carries a mark in its environment that names its state
folder: so children whose parent was killed, and servers whose state folder was deleted, are found too.
"""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Self

import psutil
from pydantic import ValidationError

from infra.errors import one_line
from infra.records import Record
from infra.web_settings import is_web, loopback_without_proxy, usable_web_environment

MARK = "CONVOY_LOCAL_SERVER"
CLOCK_STEP = 1.5  # seconds: a creation time is told relative to the clock, which may be set meanwhile
TERM_PATIENCE = 5.0  # seconds for a server to end by itself; SeaweedFS 4.48's admin part sometimes never does
KILL_PATIENCE = 5.0
POLL = 0.05  # seconds between looks at ending processes
GO_CRASH = re.compile(r"F\d{4} |panic: |fatal error: ")


class Server(Record):
    """What to run as one server of a state folder.

    Attributes:
        command: program and arguments, free of secrets: every user of the machine can read them.
        environment: variables set for it, besides those that it inherits; may hold secrets.
        not_inherited: beginnings of names of variables that it must not inherit.
        asks_the_web: whether it inherits the user's proxies and certificates, as far as they can be used.
        folder: its data and working folder.
        log: file that takes its output.
        ports: all ports that it opens.
        version: of its library: a running server is replaced after an upgrade.
    """

    command: tuple[str, ...]
    environment: dict[str, str]
    not_inherited: tuple[str, ...]
    asks_the_web: bool = False
    folder: Path
    log: Path
    ports: tuple[int, ...]
    version: str = ""

    @property
    def digest(self) -> str:
        """Changes when a running server would have to be restarted to be as defined here."""
        return sha256(json.dumps([self.command, self.environment, self.version], sort_keys=True).encode()).hexdigest()


class StartRecord(Record):
    """A start of a server, as kept in the state folder."""

    pid: int
    created: float
    digest: str

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """The record in `path`, or None if there is none that can be read."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            return None

    def process(self, mark: str) -> psutil.Process | None:
        """The recorded process, or None if it ended, whoever has its id now."""
        with suppress(psutil.Error):
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.created) < CLOCK_STEP or _has_mark(process, mark)
            if same and _lives(process):
                return process
        return None


def start(server: Server, mark: str, record: Path) -> subprocess.Popen[bytes]:
    """Start `server` in a session of its own, without standard input, and write its record."""
    server.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    server.log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if server.log.exists():
        server.log.replace(server.log.with_suffix(".log.1"))
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(server.not_inherited) and not is_web(k)}
    if server.asks_the_web:
        inherited |= usable_web_environment()
    with server.log.open("wb") as log:
        process = subprocess.Popen(
            server.command,
            env=inherited | loopback_without_proxy(inherited) | server.environment | {MARK: mark},
            cwd=server.folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            umask=0o077,
        )
    created = psutil.Process(process.pid).create_time()  # not reaped yet, so there even if it died already
    record.write_text(StartRecord(pid=process.pid, created=created, digest=server.digest).model_dump_json())
    return process


def members(mark: str, record: StartRecord | None) -> set[psutil.Process]:
    """Every living process of the server with this mark and record."""
    found: set[psutil.Process] = set()
    if record and (leader := record.process(mark)):
        found.add(leader)
        with suppress(psutil.Error):
            found.update(leader.children(recursive=True))
    found.update(process for process in psutil.process_iter() if _has_mark(process, mark))
    return {process for process in found if _lives(process)}


def stop(find: Callable[[], set[psutil.Process]]) -> None:
    """End all processes that `find` finds, until it finds none: SIGTERM, a wait, SIGKILL."""
    ended: set[psutil.Process] = set()
    for sent, patience in ((signal.SIGTERM, TERM_PATIENCE), (signal.SIGKILL, KILL_PATIENCE)):
        asked: set[psutil.Process] = set()
        deadline = time.monotonic() + patience
        while (found := find()) and time.monotonic() < deadline:
            for process in found - asked:
                with suppress(psutil.Error):
                    process.send_signal(sent)
            asked |= found
            time.sleep(POLL)
        ended |= asked
    for process in ended:
        with suppress(psutil.Error):
            process.wait(timeout=0)  # takes our own child's exit status, or it would stay a zombie


def listens(port: int, found: Iterable[psutil.Process]) -> bool:
    """Whether one of these processes listens on `port`."""
    for process in found:
        with suppress(psutil.Error):
            for connection in process.net_connections(kind="tcp"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                    return True
    return False


def log_end(path: Path, lines: int = 3, characters: int = 600) -> str:
    """The last lines of a log that say something, as one line; of a Go program that crashed, the reason."""
    try:
        with path.open("rb") as log:
            log.seek(max(0, path.stat().st_size - 1_000_000))
            text = log.read().decode(errors="replace")
    except OSError:
        return "(no log)"
    said = [one_line(line) for line in text.splitlines() if line.strip()]
    if crash := next((line for line in said if GO_CRASH.match(line)), None):  # all its threads' stacks follow
        return crash[:characters]
    return " | ".join(said[-lines:])[-characters:] or "(empty)"


def _has_mark(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(MARK) == mark
    except (psutil.Error, OSError):  # another user's process, or one that has just ended
        return False


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
