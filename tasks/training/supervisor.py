"""The program between the train task and torchrun: starts the ranks, and answers for none outliving the task.

    python -m tasks.training.supervisor FOLDER        (see protocol/job.py for the folder; started by train.py)

torchrun puts every rank into a session of its own, so no process group holds them all, and a killed torchrun leaves
its ranks running. So this program adopts orphans, and ends the whole tree below it when its standard input closes:
which the kernel does for the task, however the task ends. Should this program be killed, the kernel kills torchrun,
and the ranks with it (`infra.machine.lifeline.die_with_parent`).
"""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from infra.errors import ServiceError, UsageError
from infra.machine.lifeline import (
    adopt_orphans,
    dying_with_this_process,
    end_descendants,
    hear_sigterm_as_end_of_input,
)
from tasks.config.launchers import Launcher
from tasks.training.protocol.job import Event, JobFolder, Outcome, Restarts
from tasks.training.protocol.memory_file import memory_file
from tasks.training.protocol.patience import HUNG, OWNER
from tasks.training.torchrun import ALONE, start_torchrun

POLL = 0.1  # seconds


def main() -> int:
    folder = JobFolder(Path(sys.argv[1]))
    adopt_orphans()
    received = hear_sigterm_as_end_of_input()
    try:
        status = LAUNCHERS[folder.read_job().launcher](folder)
        return 128 + received[0] if received else status
    except (UsageError, ServiceError) as error:
        folder.write_outcome(Outcome(status="failed", error=str(error), exit_status=error.exit_status))
        return error.exit_status
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        end_descendants(OWNER)


def run_here(folder: JobFolder) -> int:
    """Start the ranks, and again after a crash, from their last checkpoint, until they say how it ended."""
    restarts = Restarts(folder)
    while True:
        status = _start_ranks(folder)
        outcome = folder.read_outcome()
        if status is None or (outcome and outcome.status != "crashed"):
            return status or 0
        if not restarts.take():
            return status
        _end_ranks(folder)
        reason = folder.killed() or (outcome.error if outcome else folder.log_end())
        folder.write_event(Event(warning=f"{reason}; starting again from the last checkpoint"))
        folder.start_again()


def _start_ranks(folder: JobFolder) -> int | None:
    """One start of torchrun; its exit status, or None if the task has ended, or wants us to end.

    The ranks meet in a file in memory and talk over the loopback interface: a TCP store would listen on every
    interface of the machine, without credentials; and on a full disk, PyTorch's FileStore waits without end for the
    rest of an entry that could be written in part only.
    """
    job = folder.read_job()
    with memory_file() as meeting, folder.log.open("wb") as log:
        torchrun = start_torchrun(
            folder.path,
            ranks=job.world_size,
            meeting=ALONE,
            ranks_meet=meeting,
            interface="lo",
            log=log.fileno(),
        )
        while torchrun.poll() is None:
            if _task_wants_end(POLL):
                _end_ranks(folder)  # now, while the ranks' meeting place is still there
                return None
        return torchrun.returncode


def _end_ranks(folder: JobFolder) -> None:
    end_descendants(lambda: OWNER if folder.stopped else HUNG)


def run_on_nodes(folder: JobFolder) -> int:
    """Have nodes train that join, and this machine, if it is to be one of them."""
    from tasks.training.nodes.coordinator import Coordinator  # which loads boto3

    job = folder.read_job()
    if job.nodes.here:
        with (folder.path / "agent.log").open("wb") as log:
            subprocess.Popen(
                [sys.executable, "-m", "tasks.training.nodes.agent", job.run_id],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=dying_with_this_process(),
            )
    Coordinator(folder).run(lambda: _task_wants_end(0.0))
    return 0


def run_in_ray(folder: JobFolder) -> int:
    """Have actors of a Ray cluster train."""
    from tasks.training.launchers.ray import agents
    from tasks.training.nodes.coordinator import Coordinator

    with agents(folder):
        Coordinator(folder).run(lambda: _task_wants_end(0.0))
    return 0


def run_in_kubernetes(folder: JobFolder) -> int:
    """Have the pods of a Job train."""
    from tasks.training.launchers.kubernetes import agents
    from tasks.training.nodes.coordinator import Coordinator

    with agents(folder):
        Coordinator(folder).run(lambda: _task_wants_end(0.0))
    return 0


def _task_wants_end(seconds: float) -> bool:
    """Whether standard input is closed, looking for so long."""
    readable, _, _ = select.select([sys.stdin], [], [], seconds)
    return bool(readable) and not os.read(sys.stdin.fileno(), 1)


LAUNCHERS: dict[Launcher, Callable[[JobFolder], int]] = {
    "local": run_here,
    "nodes": run_on_nodes,
    "ray": run_in_ray,
    "kubernetes": run_in_kubernetes,
}
"""How the ranks of a job are brought to its end, until its outcome is in the folder; returns an exit status."""


if __name__ == "__main__":
    sys.exit(main())
