"""Launcher for ranks on this machine, under one torchrun."""

from collections.abc import Callable

from infra.machine.lifeline import end_descendants
from tasks.training.protocol.job import STARTING, Event, JobFolder, Restarts
from tasks.training.protocol.memory_file import memory_file
from tasks.training.protocol.patience import HUNG_RANKS_WAIT, SUPERVISOR_WAIT
from tasks.training.torchrun import ALONE, start_torchrun

POLL_SECONDS = 0.1


def run(folder: JobFolder, wants_end: Callable[[float], bool]) -> int:
    """Starts the ranks, and restarts them from the last checkpoint after a crash, until the training has an outcome.

    Args:
        wants_end: waits at most the given seconds; returns whether the task has ended or asks for a stop.

    Returns:
        The exit status of torchrun; 0 after a stop.
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
        folder.write_event(Event(warning=f"{reason}; starting again from the last checkpoint", waiting=STARTING))
        folder.start_again()


def _start_ranks(folder: JobFolder, wants_end: Callable[[float], bool]) -> int | None:
    """Starts torchrun and waits for it; returns its exit status, or None after a stop.

    The ranks' rendezvous is a file in memory, and their traffic uses the loopback interface. A TCP store would listen
    on every interface of the machine, without credentials. On a full disk, PyTorch's FileStore waits without end for
    the rest of an entry that was written only in part.
    """
    job = folder.read_job()
    with memory_file() as rank_store, folder.log.open("wb") as log:
        torchrun = start_torchrun(
            folder.path, ranks=job.world_size, rendezvous=ALONE, rank_store=rank_store, interface="lo", log=log.fileno()
        )
        while torchrun.poll() is None:
            if wants_end(POLL_SECONDS):
                _end_ranks(folder)  # while the file of their rendezvous still exists
                return None
        return torchrun.returncode


def _end_ranks(folder: JobFolder) -> None:
    end_descendants(lambda: SUPERVISOR_WAIT if folder.stopped else HUNG_RANKS_WAIT)
