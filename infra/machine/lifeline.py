"""Makes processes end with the process that started them. Linux only: it uses prctl(2)."""

import ctypes
import os
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import psutil

PR_SET_PDEATHSIG, PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 1, 15, 36

RANK_NAME = re.compile(r"rank-(\d+)")
"""Matches the process name of a rank; the group is its global rank."""

TORCHRUN_PID = "CONVOY_TORCHRUN_PID"
"""The environment variable that gives ranks the process id of their parent."""


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl failed")


def name_process(name: str) -> None:
    """Names this process, in at most 15 characters; its command line stays that of its parent."""
    text = ctypes.create_string_buffer(name.encode())
    ctypes.CDLL(None).prctl(PR_SET_NAME, text, 0, 0, 0)


def die_with_parent(parent: int) -> None:
    """Has the kernel kill this process when its parent ends. Call it from the main thread.

    The kernel watches the parent only from now on. So if the parent has already ended, this process ends immediately.
    It compares parent ids to find that out, and `parent` must be known from before the fork: in a container any process
    may be process 1, so the id of the adopting process proves nothing.

    Args:
        parent: process id of the parent, read by the parent itself.
    """
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def dying_with_this_process() -> Callable[[], None]:
    """Returns a `preexec_fn` for children of this process: `die_with_parent`, bound to this process's id."""
    return partial(die_with_parent, os.getpid())


def hear_sigterm_as_end_of_input() -> list[signal.Signals]:
    """Makes SIGTERM end standard input, which a helper process watches: it also ends when the helper's owner dies.

    A handler that raises could run inside a weakref callback, where Python ignores the exception.

    Returns:
        An empty list, to which SIGTERM is added when it arrives.
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
    """Makes this process the parent of descendants whose own parent ends, even in another session or process group."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def end_descendants(patience: float | Callable[[], float]) -> None:
    """Ends all descendants of this process: SIGTERM, a wait, SIGKILL.

    Args:
        patience: maximum seconds to wait; a function is called again during the wait.
    """
    for sent, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, 5.0)):
        began = time.monotonic()
        signalled: set[psutil.Process] = set()
        # Each round lists them again, to find processes started or adopted since.
        while living := set(filter(is_alive, psutil.Process().children(recursive=True))):
            if time.monotonic() - began >= (seconds() if callable(seconds) else seconds):
                break
            for process in living - signalled:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(sent)
            signalled |= living
            psutil.wait_procs(living, timeout=0.2)


def is_alive(process: psutil.Process) -> bool:
    """Checks whether any thread of a process still runs, and with it keeps the process's files and ports.

    The system calls a process a zombie from the end of its first thread on, while others may still be ending.
    """
    try:
        return process.is_running() and (process.status() != psutil.STATUS_ZOMBIE or process.num_threads() > 1)
    except psutil.Error:
        return False
