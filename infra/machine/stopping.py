"""Handles SIGTERM and Ctrl-C as a request to stop, which the program checks between steps and while it waits.

Python runs a signal's handler between any two instructions of the main thread. An exception raised there may arrive
where Python ignores it (a weakref callback, `__del__`), or where a library handles it as its own. So no handler raises
here: each signal writes a byte into a socket pair, which stays there, and code that waits or begins a step checks for
it. The command's work runs in a separate thread, so that the main thread is always free to receive signals, and so that
Prefect, which installs a handler in the main thread only, installs none.

A signal that is ignored from the start stays ignored: a shell without job control starts background jobs with SIGINT
ignored, since Ctrl-C is meant for the foreground job.
"""

import atexit
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent import futures
from contextlib import suppress
from types import FrameType
from typing import TypeVar

from infra.machine.background import in_background

Output = TypeVar("Output")

EXIT_STATUS = {signal.SIGTERM: 75, signal.SIGINT: 130}
DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)
GRACEFUL_PRESSES = 2  # presses of Ctrl-C that wait for the step to end; the next one ends the program like `kill -9`
HANDLER_SECONDS = 0.5  # after which a signal is handled that arrived just before a wait began, which it did not end
SAME_PRESS_SECONDS = 0.3  # signals in quick succession are one press: timeout(1) signals the program and its group


class Stopped(BaseException):
    """A signal asked this process to end. It is no Exception, so that no code retries it as a failure."""

    def __init__(self, sent: signal.Signals) -> None:
        self.exit_status = EXIT_STATUS[sent]
        super().__init__("interrupted" if sent == signal.SIGINT else f"ended by {sent.name}")


_read_end, _write_end = socket.socketpair()  # one per process, like the handlers
_read_end.setblocking(False)
_write_end.setblocking(False)
_reading = threading.Lock()
_replaced: dict[signal.Signals, object] = {}
_presses: list[float] = []  # times of Ctrl-C
_at_end: list[Callable[[Stopped], None]] = []
_status: int | None = None
_deferred = False  # whether `defer` has handled a signal for which nothing has raised Stopped yet


def listen() -> None:
    """Begins to record SIGTERM and SIGINT, unless they are ignored or handled already. Call it from the main thread."""
    for each in EXIT_STATUS:
        if signal.getsignal(each) in DEFAULTS:
            _replaced[each] = signal.signal(each, _receive)
    if _replaced:
        overhear()
        atexit.register(_exit)  # registered first, so called last


def overhear() -> bool:
    """Records which signals arrive, whatever their handlers do; returns whether it does.

    Does nothing outside the main thread, or if an event loop has set its own wakeup descriptor.
    """
    if threading.current_thread() is not threading.main_thread():
        return False
    previous = signal.set_wakeup_fd(_write_end.fileno(), warn_on_full_buffer=False)
    if previous in (-1, _write_end.fileno()):
        return True
    signal.set_wakeup_fd(previous)
    return False


def unlisten() -> None:
    """Restores the signals' default actions, for commands that do not check for them.

    Raises:
        Stopped: a signal has arrived.
    """
    for each in list(_replaced):
        signal.signal(each, _replaced.pop(each))  # type: ignore[arg-type]
    check()


def asked() -> Stopped | None:
    """Returns the first signal that has arrived; None if none has."""
    with _reading:
        while True:
            try:
                (number,) = _read_end.recv(1, socket.MSG_PEEK)
            except BlockingIOError:
                return None
            if number in EXIT_STATUS:
                return Stopped(signal.Signals(number))
            _read_end.recv(1)  # another signal, which the program that called Convoy handles


def check() -> None:
    """Raises Stopped if a signal has arrived."""
    global _deferred
    if stopped := asked():
        _deferred = False
        raise stopped


def defer(number: int, frame: FrameType | None) -> None:
    """Handles a signal by nothing, while code runs that checks for it."""
    global _deferred
    _deferred = True


def deliver_late() -> None:
    """Sends SIGTERM to this process again if `defer` has handled one that came after the last check."""
    global _deferred
    if _deferred:
        _deferred = False
        signal.raise_signal(signal.SIGTERM)


def forget() -> None:
    """Forgets the signals that have arrived: a program that went on after Ctrl-C begins something new.

    Without effect after `listen`, since a command ends after a signal.
    """
    with _reading, suppress(BlockingIOError):
        while not _replaced and _read_end.recv(64):
            pass


def wait(seconds: float) -> None:
    """Returns after `seconds`, or immediately when a signal has arrived. The caller calls `check`."""
    end = time.monotonic() + seconds
    while asked() is None and (left := end - time.monotonic()) > 0:
        select.select([_read_end], [], [], left)


def sleep(seconds: float) -> None:
    """Waits for `seconds`.

    Raises:
        Stopped: a signal has arrived, before or during the wait.
    """
    wait(seconds)
    check()


def attended(work: Callable[[], Output]) -> Output:
    """Returns what `work` returns, or raises what it raises, while the main thread only receives signals.

    Without `listen`, `work` runs in this thread.

    Raises:
        Stopped: a signal has arrived before `work` began.
    """
    check()
    if not _replaced:
        return work()
    output = in_background(work)
    while not output.done():
        futures.wait([output], HANDLER_SECONDS)
    return output.result()


def at_end(correct: Callable[[Stopped], None]) -> None:
    """Registers a function that corrects the reported outcome if a signal arrives after the report."""
    _at_end.append(correct)


def end(status: int) -> None:
    """Ends the program with an exit status; a signal that has arrived, or still arrives, replaces that status.

    Without `listen`, only raises SystemExit.
    """
    global _status
    if _replaced:
        _status = status  # from now on the handler ends the program immediately
        if status not in EXIT_STATUS.values() and (stopped := asked()):
            _end_immediately(stopped)
    sys.exit(status)


def _receive(number: int, frame: FrameType | None) -> None:
    sent = signal.Signals(number)
    if _status is not None and _status not in EXIT_STATUS.values():
        _end_immediately(Stopped(sent))
    if sent != signal.SIGINT or (_presses and time.monotonic() - _presses[-1] < SAME_PRESS_SECONDS):
        return
    _presses.append(time.monotonic())
    if len(_presses) > GRACEFUL_PRESSES:
        os._exit(EXIT_STATUS[sent])  # processes that this one has started end with it
    if len(_presses) == GRACEFUL_PRESSES:
        os.write(2, b"\nstopping at the end of this step; press Ctrl-C again to stop immediately\n")


def _end_immediately(stopped: Stopped) -> None:
    global _status
    _status = stopped.exit_status
    try:
        for correct in _at_end:
            correct(stopped)
        os.write(2, f"convoy: {stopped}\n".encode())
    finally:
        os._exit(stopped.exit_status)


def _exit() -> None:
    """Skips the rest of the interpreter's shutdown, during which signals have their default actions again."""
    if _status is not None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # its reader has ended, or it is closed
                stream.flush()
        os._exit(_status)
