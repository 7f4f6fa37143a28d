"""Processes that cannot outlive their owner. Linux only: it rests on prctl(2)."""

import ctypes
import os
import signal
import time

import psutil

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
SUPERVISOR_PID = "CONVOY_SUPERVISOR_PID"


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl failed")


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends. Call it from the main thread.

    The kernel looks at the parent from now on only; a parent that is gone already has left us to the supervisor, or
    to process 1, and then we end at once.
    """
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() in (1, int(os.environ.get(SUPERVISOR_PID, 0))):
        os.kill(os.getpid(), signal.SIGKILL)


def hear_sigterm_as_end_of_input() -> list[signal.Signals]:
    """Makes SIGTERM end standard input, which a helper process watches because its owner's end closes it.

    A handler that raised instead might do so inside a weakref callback, where Python ignores it.

    Returns:
        Empty; holds SIGTERM once that has arrived.
    """
    received: list[signal.Signals] = []

    def end_input(*_: object) -> None:
        received.append(signal.SIGTERM)
        empty = os.open(os.devnull, os.O_RDONLY)
        os.dup2(empty, 0)
        os.close(empty)

    signal.signal(signal.SIGTERM, end_input)
    return received


def adopt_orphans() -> None:
    """Make descendants whose parent ends children of this process, wherever they put themselves, so none is lost."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def end_descendants(patience: float) -> None:
    """End every descendant of this process: SIGTERM, a wait of up to `patience` seconds, SIGKILL."""
    for sent, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, 5.0)):
        deadline = time.monotonic() + seconds
        told: set[psutil.Process] = set()
        # Looking again and again finds what was started, or orphaned to us, since the last look.
        while (living := _descendants()) and time.monotonic() < deadline:
            for process in living - told:
                try:
                    process.send_signal(sent)
                except psutil.NoSuchProcess:
                    pass
            told |= living
            psutil.wait_procs(living, timeout=0.2)


def _descendants() -> set[psutil.Process]:
    return {p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE}
