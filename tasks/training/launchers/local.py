"""The ranks on this machine, under one torchrun."""

from collections.abc import Callable

from infra.machine.lifeline import end_descendants
from tasks.training.protocol.job import Event, JobFolder, Restarts
from tasks.training.protocol.memory_file import memory_file
from tasks.training.protocol.patience import HUNG, OWNER
from tasks.training.torchrun import ALONE, start_torchrun

POLL = 0.1  # seconds


def run(folder: JobFolder, wants_end: Callable[[float], bool]) -> int:
    """Starts the ranks, and again after a crash, from their last checkpoint, until they say how it ended.

    Args:
        folder: of the job.
        wants_end: waits so many seconds at most for the task to end, or to want this to; tells whether it does.

    Returns:
        The exit status of the ranks.
    """
    restarts = Restarts(folder)
    while True:
        status = _start_ranks(folder, wants_end)
        outcome = folder.read_outcome()
        if status is None or (outcome and outcome.status != "crashed"):
            return status or 0
        if not restarts.take():
            return status
        _end_ranks(folder)
        reason = folder.killed() or (outcome.error if outcome else folder.log_end())
        folder.write_event(Event(warning=f"{reason}; starting again from the last checkpoint"))
        folder.start_again()


def _start_ranks(folder: JobFolder, wants_end: Callable[[float], bool]) -> int | None:
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
            if wants_end(POLL):
                _end_ranks(folder)  # now, while the ranks' meeting place is still there
                return None
        return torchrun.returncode


def _end_ranks(folder: JobFolder) -> None:
    end_descendants(lambda: OWNER if folder.stopped else HUNG)
