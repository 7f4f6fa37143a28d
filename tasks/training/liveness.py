"""Liveness of trainings on this machine: a flow holds a file lock while it trains, evaluates and releases.

<home>/runs/<MLflow run>/lock        the kernel releases it when the flow's process ends, in any way
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Literal

import psutil

from infra.errors import UsageError
from infra.machine import stopping
from infra.machine.lifeline import RANK_NAME
from infra.machine.locks import is_held, note_of_dead_holder, try_locked
from infra.settings import Settings

LOCK_WAIT_SECONDS = 10.0  # `convoy doctor` may hold the lock for a moment
POLL_SECONDS = 0.1
DEAD_AFTER_SECONDS = 3600.0  # without a lock or a changed file; evaluation and gates change no file

RANK_OWNERS = ("tasks.training.supervisor", "tasks.training.nodes.agent")

Liveness = Literal["alive", "dead", "unknown"]


@contextmanager
def hold_run_lock(run_id: str, flow_run: str = "") -> Iterator[None]:
    """Holds the lock of a run in the block, as a sign that this process works on it.

    Args:
        flow_run: id of the flow run, by which to tell it from a later one on another machine.

    Raises:
        UsageError: another process of this state folder holds the lock.
    """
    deadline = time.monotonic() + LOCK_WAIT_SECONDS
    while True:
        with try_locked(lock_file(run_id), flow_run) as held:
            if held:
                yield
                return
        if time.monotonic() > deadline:
            raise UsageError(f"another process works on run {run_id}; wait for it, or `convoy cancel {run_id}`")
        stopping.sleep(POLL_SECONDS)


def lock_file(run_id: str) -> Path:
    """Returns the file that a run's flow holds a lock on."""
    return Settings().runs / run_id / "lock"


def liveness(run_id: str, flow_run: str, started: datetime | None) -> Liveness:
    """Returns what this machine knows about the flow run that works on a run, given the flow run's id and start time.

    `unknown` means that the flow run may be on another machine.
    """
    folder = Settings().runs / run_id
    if is_held(lock_file(run_id)) or any(not orphaned(each) for each in processes_of(folder)):
        return "alive"
    note = note_of_dead_holder(lock_file(run_id))
    if note is not None and note == flow_run:
        return "dead"
    try:
        ordered = (folder / "job.json").stat().st_mtime
        last_change = max(file.stat().st_mtime for file in folder.iterdir())
    except (FileNotFoundError, ValueError):
        return "unknown"
    # A job that is older than the flow run belongs to an earlier one: this flow run may be on another machine.
    is_current = started is not None and ordered >= started.timestamp()
    return "dead" if is_current and time.time() - last_change > DEAD_AFTER_SECONDS else "unknown"


def processes_of(folder: Path) -> list[psutil.Process]:
    """Returns the supervisors, agents and ranks of a job's folder, or of all jobs, given the folder of all."""
    found = []
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
            if process.status() == psutil.STATUS_ZOMBIE or _program(process) is None:
                continue
        except psutil.Error:
            continue
        if any(Path(word) == folder or folder in Path(word).parents for word in command[1:]):
            found.append(process)
    return found


def orphaned(process: psutil.Process) -> bool:
    """Checks whether a supervisor has lost its flow, by the flow's lock, or an agent or rank its owner."""
    try:
        program, command, parents = _program(process), process.cmdline(), process.parents()
    except psutil.Error:  # it has ended
        return False
    if program == "tasks.training.supervisor":
        return note_of_dead_holder(Path(command[-1]) / "lock") is not None
    return not any(_program(parent) in RANK_OWNERS for parent in parents)


def _program(process: psutil.Process) -> str | None:
    """Returns the module of a supervisor, agent or rank; None for other processes, or if it cannot be read.

    Ranks are forked by torchrun and have its command line, but a name of their own.
    """
    with suppress(psutil.Error):  # the process has ended, or is another user's
        for option, module in pairwise(process.cmdline()):
            if option == "-m":
                if module == "tasks.training.torchrun" and RANK_NAME.fullmatch(process.name()):
                    return "tasks.training.rank"
                return module if module in RANK_OWNERS else None
    return None
