"""The local stack: starts, checks and stops an object store, MLflow and Prefect on this machine.

`up` is safe to call at any time and from several processes at once: what already runs is checked and left
alone. Each of the three can be an external server instead, named by its standard variable:
`AWS_ENDPOINT_URL`, `MLFLOW_TRACKING_URI`, `PREFECT_API_URL`. Everything else in Convoy reads the standard
variables only: `up(Settings()).apply()`. The local MLflow and Prefect ask for no
password; see `infra.stack.servers`.
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
from infra.stack.state import HEALTH, NAMES, ServerName, StackFolder
from infra.web_settings import check_web_environment, proxy_of

START_PATIENCE = 180.0  # seconds until a server is ready; a cold start on two busy cores takes under a minute
BUSY_PATIENCE = 30.0  # seconds for a running server to answer, however busy the machine is
STORE_PATIENCE = 10.0  # seconds for a running object store to take what is written
ANSWER_PATIENCE = 5.0  # seconds for one answer
ROOM = 32 << 20  # bytes; a disk with less of them is full
POLL = 0.1  # seconds between looks at a starting server
ATTEMPTS = 3  # at finding ports that nobody else takes in the meantime

OnEvent = Callable[[str], None]


class ServerStatus(Record):
    """State of one server: `dead` is one that was started, but is gone or does not answer."""

    name: ServerName
    url: str
    state: Literal["running", "stopped", "external", "dead"]
    pid: int | None = None
    log: Path | None = None


class _PortTaken(Exception):
    """Another program took a port between our look and the server's start."""


def up(
    settings: Settings, on_event: OnEvent = lambda event: None, *, only: Collection[ServerName] = NAMES
) -> Endpoints:
    """Starts what does not run yet, side by side; returns when all answer and the bucket exists.

    Args:
        on_event: told in a few words what happens, for people.
        only: the servers to start; the others keep their state, and their addresses are where they would be.

    Raises:
        ServiceError: a server died at its start or does not answer; the message has the end of its log.
        UsageError: a database was written by a newer MLflow or Prefect than the installed one.
    """
    folder = StackFolder(settings)
    external = [(variable, address) for name, variable, address in folder.external() if name in only]
    if external:
        aws = "seaweedfs" in {name for name, _, _ in folder.external()}
        check_web_environment({k: v for k, v in os.environ.items() if aws or not k.startswith("AWS_")})
    for variable, address in external:
        _check_external(variable, address)
    try:
        with folder.locked(on_event):
            for _ in range(ATTEMPTS):
                try:
                    return _up(folder, on_event, only)
                except _PortTaken as taken:
                    on_event(str(taken))
    except OSError as error:
        raise ServiceError(f"the servers cannot be started in {settings.home}: {error}") from None
    raise ServiceError(f"other programs took the servers' ports {ATTEMPTS} times in a row: try again")


def down(settings: Settings) -> list[str]:
    """Stop every server of this state folder with all its processes; return the names of those that ran."""
    folder = StackFolder(settings)
    if not os.path.exists(folder.root) and not any(folder.members(name) for name in NAMES):
        return []
    try:
        with folder.locked():
            ran = [name for name in NAMES if folder.members(name)]
            processes.stop(lambda: {process for name in ran for process in folder.members(name)})
            for name in NAMES:
                folder.record_file(name).unlink(missing_ok=True)
    except OSError as error:
        raise ServiceError(f"the servers cannot be stopped in {settings.home}: {error}") from None
    return list(ran)


def status(settings: Settings) -> list[ServerStatus]:
    """Look at each server once."""
    folder = StackFolder(settings)
    external = {name: without_login(address) for name, _, address in folder.external()}
    found = []
    with httpx.Client(trust_env=False, verify=False, timeout=ANSWER_PATIENCE) as client:
        for name in NAMES:
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
    wanted = [name for name in NAMES if name in only and name not in external]
    migrations.outdated(folder.settings.home, wanted)  # refuses a newer database before anything is touched
    folder.prepare(on_event)
    with httpx.Client(trust_env=False, verify=False, timeout=ANSWER_PATIENCE) as client:
        starting: dict[ServerName, subprocess.Popen[bytes]] = {}
        missing = [name for name in wanted if not _runs(name, folder, client, on_event)]
        migrations.migrate(folder.settings.home, missing, on_event)
        for name in missing:
            on_event(f"starting {name} at {folder.url(name)}")
            starting[name] = processes.start(folder.server(name), folder.mark(name), folder.record_file(name))
        for name in wanted:
            if name in starting:
                _wait(name, starting[name], folder, client)
                if name == "seaweedfs":  # the first, so that this happens while the others still start
                    _make_store_ready(folder, BUSY_PATIENCE)
                on_event(f"{name} is ready at {folder.url(name)}")
    return folder.endpoints()


def _runs(name: ServerName, folder: StackFolder, client: httpx.Client, on_event: OnEvent) -> bool:
    """Whether a server runs as it is defined now; if it runs in another way, or not well, stop it."""
    record = folder.record(name)
    if record is None or record.process(folder.mark(name)) is None:
        return False
    trouble = "" if record.digest == folder.server(name).digest else "has other settings or another version"
    deadline = time.monotonic() + BUSY_PATIENCE
    while not trouble and record.process(folder.mark(name)):
        if _answers(name, folder, client):
            if name != "seaweedfs" or _stores(folder, on_event):
                return True
            trouble = "does not store what is written"
        elif time.monotonic() > deadline:
            trouble = "does not answer"
        else:
            stopping.sleep(POLL)
    on_event(f"stopping {name}, which {trouble or 'has ended'}")
    processes.stop(partial(folder.members, name))
    return False


def _stores(folder: StackFolder, on_event: OnEvent) -> bool:
    """Whether the running object store takes what is written; yes also on a full disk, where a start would not help."""
    if shutil.disk_usage(folder.root).free < ROOM:
        on_event(f"the disk of {folder.root} is full: nothing can be stored")
        return True
    try:
        _make_store_ready(folder, STORE_PATIENCE)
    except ServiceError:
        return False
    return True


def _make_store_ready(folder: StackFolder, patience: float) -> None:
    make_ready(folder.url("seaweedfs"), folder.credentials, folder.settings.bucket, patience=patience)


def _wait(name: ServerName, process: subprocess.Popen[bytes], folder: StackFolder, client: httpx.Client) -> None:
    """Return when a server that was just started answers.

    Raises:
        ServiceError: it died or was not ready in time; nothing of it is left then.
        _PortTaken: it died because another program had one of its ports.
    """
    deadline = time.monotonic() + START_PATIENCE
    while not _answers(name, folder, client):
        ended = process.poll()
        if ended is None and time.monotonic() < deadline:
            stopping.sleep(POLL)
            continue
        processes.stop(partial(folder.members, name))
        if ended is None:
            trouble = f"was not ready within {START_PATIENCE:.0f} s"
        elif taken := [port for port in folder.server(name).ports if not is_free(port)]:
            raise _PortTaken(f"another program took port {taken[0]} before {name} did: choosing another")
        else:
            trouble = f"ended at its start with status {ended}"
        log = folder.log(name)
        raise ServiceError(f"{name} {trouble}; {log} ends: {processes.log_end(log)}")


def _answers(name: ServerName, folder: StackFolder, client: httpx.Client) -> bool:
    """Whether a server is healthy and ours: another program may answer on a port that ours failed to take."""
    try:
        healthy = client.get(folder.url(name) + HEALTH[name]).is_success
    except httpx.HTTPError:
        return False
    return healthy and processes.listens(folder.port(name), folder.members(name))


def _check_external(variable: str, address: str) -> None:
    """Ask whether anything answers there.

    Nothing secret is sent; which certificates to trust, and how to log in, is each client's own setting.
    """
    if not address.startswith(("http://", "https://")):  # MLflow also takes databases and folders
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
