"""The local stack: starts, checks and stops an object store, MLflow and Prefect on this machine.

`up` may be called at any time and from several processes at the same time: it checks running servers and leaves them
running. A standard variable replaces a local server by an external one: `AWS_ENDPOINT_URL`, `MLFLOW_TRACKING_URI`,
`PREFECT_API_URL`. `up(Settings()).apply()` sets these variables; the rest of Convoy reads only them.
The local MLflow and Prefect need no password; see `infra.stack.servers`.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Literal

import httpx

from infra.errors import ServiceError, without_login
from infra.machine import stopping
from infra.records import Record
from infra.settings import Settings
from infra.stack import migrations, processes
from infra.stack.endpoints import Endpoints
from infra.stack.object_store_ready import make_ready
from infra.stack.ports import is_free
from infra.stack.state import HEALTH_PATHS, SERVER_NAMES, ServerName, StackFolder
from infra.web_settings import check_web_environment, proxy_of

START_SECONDS = 180.0  # until a started server is ready; a cold start on two busy cores takes under a minute
BUSY_SECONDS = 30.0  # until a running server answers; the machine may be busy
STORE_SECONDS = 10.0  # until a running object store accepts a write
ANSWER_SECONDS = 5.0  # timeout of one request
FULL_DISK_BYTES = 32 << 20  # a disk with less free space counts as full
POLL_SECONDS = 0.1  # between two checks of a starting server
PORT_ATTEMPTS = 3  # to start on ports that no other program takes in the meantime

OnEvent = Callable[[str], None]


class ServerStatus(Record):
    """The state of one server: `dead` means that it was started, but has ended or does not answer."""

    name: ServerName
    url: str
    state: Literal["running", "stopped", "external", "dead"]
    pid: int | None = None
    log: Path | None = None


class _PortTaken(Exception):
    """Another program took a port after the check that it was free, and before the server did."""


def up(
    settings: Settings, on_event: OnEvent = lambda event: None, *, only: Collection[ServerName] = SERVER_NAMES
) -> Endpoints:
    """Starts in parallel the servers that do not run yet; returns once all answer and the bucket exists.

    Args:
        on_event: called with a short message for people about each event.
        only: the servers to start. The others keep their state; their addresses are those of their next start.

    Raises:
        ServiceError: a server ended at its start or does not answer; the message has the end of its log.
        UsageError: a database was written by a newer MLflow or Prefect than the installed one.
    """
    folder = StackFolder(settings)
    _check_all_external(folder, only)
    try:
        with folder.locked(on_event):
            for _ in range(PORT_ATTEMPTS):
                try:
                    return _up(folder, on_event, only)
                except _PortTaken as taken:
                    on_event(str(taken))
    except OSError as error:
        raise ServiceError(f"the servers cannot be started in {settings.home}: {error}") from None
    raise ServiceError(f"other programs took the servers' ports {PORT_ATTEMPTS} times in a row: try again")


def running(settings: Settings, *, only: Collection[ServerName] = SERVER_NAMES) -> Endpoints:
    """Returns the servers' addresses if those of `only` run; starts and changes nothing.

    Raises:
        ServiceError: a server does not run, or does not answer.
    """
    folder = StackFolder(settings)
    _check_all_external(folder, only)
    found = status(settings, only=only)
    if missing := [server.name for server in found if server.state in ("stopped", "dead")]:
        raise ServiceError(f"not running in {settings.home}: {', '.join(missing)}; `convoy up` starts them")
    return folder.endpoints()


def down(settings: Settings) -> list[str]:
    """Stops every server of this state folder with all its processes; returns the names of those that ran."""
    folder = StackFolder(settings)
    if not os.path.exists(folder.root) and not any(folder.members(name) for name in SERVER_NAMES):
        return []
    try:
        with folder.locked():
            ran = [name for name in SERVER_NAMES if folder.members(name)]
            processes.stop(lambda: {process for name in ran for process in folder.members(name)})
            for name in SERVER_NAMES:
                folder.record_file(name).unlink(missing_ok=True)
    except OSError as error:
        raise ServiceError(f"the servers cannot be stopped in {settings.home}: {error}") from None
    return list(ran)


def status(settings: Settings, *, only: Collection[ServerName] = SERVER_NAMES) -> list[ServerStatus]:
    """Returns the state of each server; asks each running one once."""
    folder = StackFolder(settings)
    external = {name: without_login(address) for name, _, address in folder.external()}
    found = []
    with httpx.Client(trust_env=False, verify=False, timeout=ANSWER_SECONDS) as client:
        for name in filter(only.__contains__, SERVER_NAMES):
            if name in external:
                found.append(ServerStatus(name=name, url=external[name], state="external"))
                continue
            record = folder.record(name)
            leader = record.process(folder.mark(name)) if record else None
            state: Literal["running", "stopped", "dead"] = "dead" if record else "stopped"
            if leader and _answers(name, folder, client):
                state = "running"
            pid = leader.pid if leader else None
            found.append(ServerStatus(name=name, url=folder.url(name), state=state, pid=pid, log=folder.log(name)))
    return found


def _up(folder: StackFolder, on_event: OnEvent, only: Collection[ServerName]) -> Endpoints:
    external = {name for name, _, _ in folder.external()}
    wanted = [name for name in SERVER_NAMES if name in only and name not in external]
    migrations.outdated(folder.settings.home, wanted)  # refuses a newer database before anything is changed
    stopping.check()  # another command may have held the lock for long
    folder.prepare(on_event)
    with httpx.Client(trust_env=False, verify=False, timeout=ANSWER_SECONDS) as client:
        starting: dict[ServerName, subprocess.Popen[bytes]] = {}
        missing = [name for name in wanted if not _runs_as_defined(name, folder, client, on_event)]
        migrations.migrate(folder.settings.home, missing, on_event)
        for name in missing:
            on_event(f"starting {name} at {folder.url(name)}")
            starting[name] = processes.start(folder.server(name), folder.mark(name), folder.record_file(name))
        for name in wanted:
            if name in starting:
                _wait_until_ready(name, starting[name], folder, client)
                if name == "seaweedfs":  # it comes first, so the others start meanwhile
                    _make_store_ready(folder, BUSY_SECONDS)
                on_event(f"{name} is ready at {folder.url(name)}")
    return folder.endpoints()


def _runs_as_defined(name: ServerName, folder: StackFolder, client: httpx.Client, on_event: OnEvent) -> bool:
    """Checks whether a server runs well and as it is defined now; stops it if it runs otherwise."""
    record = folder.record(name)
    if record is None or record.process(folder.mark(name)) is None:
        return False
    trouble = "" if record.digest == folder.server(name).digest else "has other settings or another version"
    deadline = time.monotonic() + BUSY_SECONDS
    while not trouble and record.process(folder.mark(name)):
        if _answers(name, folder, client):
            if name != "seaweedfs" or _accepts_writes(folder, on_event):
                return True
            trouble = "does not store what is written"
        elif time.monotonic() > deadline:
            trouble = "does not answer"
        else:
            stopping.sleep(POLL_SECONDS)
    on_event(f"stopping {name}, which {trouble or 'has ended'}")
    processes.stop(partial(folder.members, name))
    return False


def _accepts_writes(folder: StackFolder, on_event: OnEvent) -> bool:
    """Checks whether the running object store accepts writes. True on a full disk, where a restart would not help."""
    if shutil.disk_usage(folder.root).free < FULL_DISK_BYTES:
        on_event(f"the disk of {folder.root} is full: nothing can be stored")
        return True
    try:
        _make_store_ready(folder, STORE_SECONDS)
    except ServiceError:
        return False
    return True


def _make_store_ready(folder: StackFolder, seconds: float) -> None:
    make_ready(folder.url("seaweedfs"), folder.credentials, folder.settings.bucket, seconds=seconds)


def _wait_until_ready(
    name: ServerName, process: subprocess.Popen[bytes], folder: StackFolder, client: httpx.Client
) -> None:
    """Returns when a server that was just started answers.

    Raises:
        ServiceError: it ended or was not ready in time; none of its processes is left.
        _PortTaken: it ended because another program had one of its ports.
    """
    deadline = time.monotonic() + START_SECONDS
    while not _answers(name, folder, client):
        ended = process.poll()
        if ended is None and time.monotonic() < deadline:
            stopping.sleep(POLL_SECONDS)
            continue
        processes.stop(partial(folder.members, name))
        if ended is None:
            trouble = f"was not ready within {START_SECONDS:.0f} s; the machine may be busy: try again"
        elif taken := [port for port in folder.server(name).ports if not is_free(port)]:
            raise _PortTaken(f"another program took port {taken[0]} before {name} did: choosing another")
        else:
            trouble = f"ended at its start with status {ended}"
        log = folder.log(name)
        raise ServiceError(f"{name} {trouble}; {log} ends: {processes.log_end(log)}")


def _answers(name: ServerName, folder: StackFolder, client: httpx.Client) -> bool:
    """Checks whether a server is healthy, and whether its own process listens: another program may have the port."""
    try:
        healthy = client.get(folder.url(name) + HEALTH_PATHS[name]).is_success
    except httpx.HTTPError:
        return False
    return healthy and processes.listens(folder.port(name), folder.members(name))


def _check_all_external(folder: StackFolder, only: Collection[ServerName]) -> None:
    """Checks that the external servers of `only` answer, and that this environment's settings for them are usable."""
    external = [(variable, address) for name, variable, address in folder.external() if name in only]
    if external:
        aws = "seaweedfs" in {name for name, _, _ in folder.external()}
        check_web_environment({k: v for k, v in os.environ.items() if aws or not k.startswith("AWS_")})
    for variable, address in external:
        _check_external(variable, address)


def _check_external(variable: str, address: str) -> None:
    """Checks whether a server answers at an address.

    Sends no secret and verifies no certificate: each client has its own settings for certificates and login.
    """
    if not address.startswith(("http://", "https://")):  # MLflow also accepts databases
        return
    url = without_login(address)
    way = proxy_of(url)
    try:
        answer = httpx.get(url, proxy=way[1] if way else None, timeout=10, verify=False, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        advice = "correct it, or unset it to use a local server"
        raise ServiceError(f"{variable} names {url}, which does not answer ({error}): {advice}") from None
    if answer.is_server_error:
        raise ServiceError(f"{variable} names {url}, which answers with status {answer.status_code}")
