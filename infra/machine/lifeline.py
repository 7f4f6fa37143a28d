"""Processes that cannot outlive their owner. Linux only: it rests on prctl(2)."""

import ctypes
import os
import re
import signal
import time
from collections.abc import Callable
from functools import partial

import psutil

PR_SET_PDEATHSIG, PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 1, 15, 36

RANK_NAME = re.compile(r"rank-(\d+)")
"""Names of the processes of ranks, by their number among all ranks."""

TORCHRUN_PID = "CONVOY_TORCHRUN_PID"
"""The variable that tells ranks the id of their parent."""


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl failed")


def name_process(name: str) -> None:
    """Gives this process a name of its own, of at most 15 characters; its command line stays its parent's."""
    text = ctypes.create_string_buffer(name.encode())
    ctypes.CDLL(None).prctl(PR_SET_NAME, text, 0, 0, 0)


def die_with_parent(parent: int) -> None:
    """Has the kernel kill this process when its parent ends. Call it from the main thread.

    The kernel watches the parent from now on only, so a parent that is gone already ends this process at once. That
    is seen by its id, which must come from before the fork: in a container any process may be process 1, so the id of
    the adopting process says nothing.

    Args:
        parent: process id of the parent, as the parent itself sees it.
    """
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def dying_with_this_process() -> Callable[[], None]:
    """Returns a `preexec_fn` for children of this process: `die_with_parent`, bound to this process's id."""
    return partial(die_with_parent, os.getpid())


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


def end_descendants(patience: float | Callable[[], float]) -> None:
    """Ends every descendant of this process: SIGTERM, a wait, SIGKILL.

    Args:
        patience: seconds to wait at most; a function is asked again while this waits.
    """
    for sent, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, 5.0)):
        began = time.monotonic()
        told: set[psutil.Process] = set()
        # Looking again and again finds what was started, or orphaned to us, since the last look.
        while living := _descendants():
            if time.monotonic() - began >= (seconds() if callable(seconds) else seconds):
                break
            for process in living - told:
                try:
                    process.send_signal(sent)
                except psutil.NoSuchProcess:
                    pass
            told |= living
            psutil.wait_procs(living, timeout=0.2)


def _descendants() -> set[psutil.Process]:
    return {p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE}
