"""Server processes that outlive the command that started them: how they start, are found, and stop with their children.

A server is found in two independent ways. Its record in the state folder holds its process id and the process's
creation time, so another process that later gets the same id is never mistaken for it. And the environment of a server
and of its children has a mark that names the state folder, so children whose parent was killed and servers whose state
folder was deleted are found too.
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

import psutil

from infra.errors import one_line
from infra.machine.files import write_if_changed
from infra.machine.lifeline import is_alive
from infra.records import Record
from infra.web_settings import is_web, loopback_without_proxy, usable_web_environment

MARK_VARIABLE = "CONVOY_LOCAL_SERVER"
CREATION_TOLERANCE_SECONDS = 1.5  # creation times are relative to the clock, which may be set meanwhile
TERM_SECONDS = 5.0  # for a server to end after SIGTERM; SeaweedFS 4.48's admin part sometimes never does
KILL_SECONDS = 5.0
POLL_SECONDS = 0.05
GO_CRASH = re.compile(r"F\d{4} |panic: |fatal error: ")


class Server(Record):
    """The definition of one server of a state folder.

    Attributes:
        command: program and arguments, without secrets: every user of the machine can read them.
        environment: variables in addition to the inherited ones; may hold secrets.
        not_inherited: prefixes of variables that it must not inherit.
        asks_the_web: whether it inherits the user's proxies and certificates, if they are usable.
        folder: its data and working folder.
        log: the file for its output.
        ports: all ports that it opens.
        version: its library's version; a running server is replaced after an upgrade.
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
        """Changes whenever a running server must be restarted to match this definition."""
        return sha256(json.dumps([self.command, self.environment, self.version], sort_keys=True).encode()).hexdigest()


class StartRecord(Record):
    """The record of a server's last start; `created` is psutil's creation time of the process."""

    pid: int
    created: float
    digest: str

    def process(self, mark: str) -> psutil.Process | None:
        """Returns the recorded process, or None if it has ended, even if another process has its id now."""
        with suppress(psutil.Error):
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.created) < CREATION_TOLERANCE_SECONDS or _has_mark(process, mark)
            if same and is_alive(process):
                return process
        return None


def start(server: Server, mark: str, record: Path) -> subprocess.Popen[bytes]:
    """Starts `server` in its own session, without standard input, and writes its record."""
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
            env=inherited | loopback_without_proxy(inherited) | server.environment | {MARK_VARIABLE: mark},
            cwd=server.folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            umask=0o077,
        )
    created = psutil.Process(process.pid).create_time()  # not reaped yet, so it exists even if it has ended
    started = StartRecord(pid=process.pid, created=created, digest=server.digest)
    write_if_changed(record, started.model_dump_json())
    return process


def members(mark: str, record: StartRecord | None) -> set[psutil.Process]:
    """Returns every living process of the server with this mark and record."""
    found: set[psutil.Process] = set()
    if record and (leader := record.process(mark)):
        found.add(leader)
        with suppress(psutil.Error):
            found.update(leader.children(recursive=True))
    found.update(process for process in psutil.process_iter() if _has_mark(process, mark))
    return {process for process in found if is_alive(process)}


def stop(find: Callable[[], set[psutil.Process]]) -> None:
    """Ends all processes that `find` returns, until it returns none: SIGTERM, a wait, SIGKILL."""
    ending: set[psutil.Process] = set()
    for sent, seconds in ((signal.SIGTERM, TERM_SECONDS), (signal.SIGKILL, KILL_SECONDS)):
        asked: set[psutil.Process] = set()
        deadline = time.monotonic() + seconds
        # A process that is ending no longer shows its mark, so `find` may miss it before its last thread has ended.
        while (found := find() | set(filter(is_alive, ending))) and time.monotonic() < deadline:
            for process in found - asked:
                with suppress(psutil.Error):
                    process.send_signal(sent)
            asked |= found
            ending |= found
            time.sleep(POLL_SECONDS)
    for process in ending:
        with suppress(psutil.Error):
            process.wait(timeout=0)  # reaps a child of this process, which would stay a zombie


def listens(port: int, found: Iterable[psutil.Process]) -> bool:
    """Checks whether one of these processes listens on `port`."""
    for process in found:
        with suppress(psutil.Error):
            for connection in process.net_connections(kind="tcp"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                    return True
    return False


def log_end(path: Path, lines: int = 3, characters: int = 600) -> str:
    """Returns the last non-empty lines of a log as one line; for a Go program that crashed, the reason."""
    try:
        with path.open("rb") as log:
            log.seek(max(0, path.stat().st_size - 1_000_000))
            text = log.read().decode(errors="replace")
    except OSError:
        return "(no log)"
    nonempty = [one_line(line) for line in text.splitlines() if line.strip()]
    if crash := next((line for line in nonempty if GO_CRASH.match(line)), None):  # the stacks of all threads follow
        return crash[:characters]
    return " | ".join(nonempty[-lines:])[-characters:] or "(empty)"


def _has_mark(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(MARK_VARIABLE) == mark
    except (psutil.Error, OSError):  # another user's process, or it has just ended
        return False
