"""Whether a training of this machine still has a process: its flow holds a lock while it lives, whatever it does.

<home>/runs/<MLflow run>/lock        the kernel frees it when the flow's process ends, however that is
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
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

PATIENCE = 10.0  # seconds that whoever looks after a dead run may hold its lock
POLL = 0.1
SILENCE = 3600.0  # seconds without a sign of life, where there is no lock; evaluation and gates write none

OWNERS = ("tasks.training.supervisor", "tasks.training.nodes.agent")  # of ranks

Life = Literal["alive", "dead", "unknown"]


@contextmanager
def holding(run_id: str, flow_run: str = "") -> Iterator[None]:
    """Show, while the block runs, that this process goes on with a run.

    Args:
        flow_run: id of the flow run, which tells a later one of another machine from ours.

    Raises:
        UsageError: another process of this state folder does so.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        with try_locked(lock_file(run_id), flow_run) as held:
            if held:
                yield
                return
        if time.monotonic() > deadline:
            raise UsageError(f"another process goes on with run {run_id}; wait for it, or `convoy cancel {run_id}`")
        stopping.sleep(POLL)


def lock_file(run_id: str) -> Path:
    """The file that a run's flow holds a lock on."""
    return Settings().runs / run_id / "lock"


def life(run_id: str, flow_run: str, started: datetime | None) -> Life:
    """What this machine knows of the flow run that goes on with a run; `unknown` if it may be another's.

    Args:
        flow_run: id of the flow run.
        started: when it began.
    """
    folder = Settings().runs / run_id
    if is_held(lock_file(run_id)) or any(not orphaned(each) for each in processes_of(folder)):
        return "alive"
    note = note_of_dead_holder(lock_file(run_id))
    if note is not None and note == flow_run:
        return "dead"
    try:
        ordered = (folder / "job.json").stat().st_mtime
        last_sign = max(file.stat().st_mtime for file in folder.iterdir())
    except (FileNotFoundError, ValueError):
        return "unknown"
    # A job that is older than the flow run was another flow run's: this one may be at work elsewhere.
    ours = started is not None and ordered >= started.timestamp()
    return "dead" if ours and time.time() - last_sign > SILENCE else "unknown"


def processes_of(folder: Path) -> list[psutil.Process]:
    """Supervisors, agents and ranks at work in a job's folder, or, given the folder of all jobs, in any of them."""
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
    """Tells whether a supervisor has lost its flow, which the flow's lock shows, or a rank its supervisor."""
    try:
        program, command, parents = _program(process), process.cmdline(), process.parents()
    except psutil.Error:  # it has ended
        return False
    if program == "tasks.training.supervisor":
        return note_of_dead_holder(Path(command[-1]) / "lock") is not None
    return not any(_program_of(parent) in OWNERS for parent in parents)


def _program_of(parent: psutil.Process) -> str | None:
    try:
        return _program(parent)
    except psutil.Error:
        return None


def _program(process: psutil.Process) -> str | None:
    """Returns which of ours it is; None for torchrun, whose command line its ranks have too.

    Raises:
        psutil.Error: it has ended, or is another user's.
    """
    for option, module in pairwise(process.cmdline()):
        if option == "-m":
            if module == "tasks.training.torchrun" and RANK_NAME.fullmatch(process.name()):
                return "tasks.training.rank"
            return module if module in OWNERS else None
    return None
