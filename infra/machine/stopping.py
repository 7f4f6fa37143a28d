"""SIGTERM and Ctrl-C as a request that the program looks for, at its steps' boundaries and while it waits.

Python runs a signal's handler between any two instructions of the main thread, so an exception that a handler raises
may arrive where Python ignores it (a weakref callback, `__del__`), or where a library takes it for its own. Hence no
handler raises here: the kernel's signal puts a byte into a socket pair, which stays there, and whatever waits or begins
a step looks for it. The command's work runs in a thread of its own, so that the main thread is always free to receive,
and so that Prefect, which installs a handler of its own in the main thread only, does not.

A signal that is ignored from the start stays so: a shell without job control starts its background jobs with SIGINT
ignored, since the Ctrl-C is meant for what runs in the foreground.
"""

import atexit
import contextvars
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

Output = TypeVar("Output")

EXIT_STATUS = {signal.SIGTERM: 75, signal.SIGINT: 130}
DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)
PATIENT = 2  # presses of Ctrl-C that wait for the step to end; the next one ends the program as `kill -9` would
APART = 0.3  # seconds; what comes faster is one press (timeout(1) signals both the program and its group)


class Stopped(BaseException):
    """A signal asked this process to end. No Exception, so that no code takes it for a failure to be tried again."""

    def __init__(self, sent: signal.Signals) -> None:
        self.exit_status = EXIT_STATUS[sent]
        super().__init__("interrupted" if sent == signal.SIGINT else f"ended by {sent.name}")


_seen, _told = socket.socketpair()  # like the handlers, one for the process
_seen.setblocking(False)
_told.setblocking(False)
_replaced: dict[signal.Signals, object] = {}
_presses: list[float] = []  # times of Ctrl-C
_at_end: list[Callable[[Stopped], None]] = []
_status: int | None = None


def listen() -> None:
    """Notes SIGTERM and SIGINT, where they would do what they do by default. To be called from the main thread."""
    for each in EXIT_STATUS:
        if signal.getsignal(each) in DEFAULTS:
            _replaced[each] = signal.signal(each, _receive)
    if _replaced:
        overhear()
        atexit.register(_exit)  # as the first of all, so that it is called last


def overhear() -> None:
    """Notes which signals arrive, whatever their handlers do about them.

    Does nothing outside the main thread, or where an event loop has its own use for the note.
    """
    if threading.current_thread() is threading.main_thread():
        others = signal.set_wakeup_fd(_told.fileno(), warn_on_full_buffer=False)
        if others not in (-1, _told.fileno()):
            signal.set_wakeup_fd(others)


def unlisten() -> None:
    """Gives the signals their default actions back, for commands that do not look for them.

    Raises:
        Stopped: one has arrived.
    """
    for each in list(_replaced):
        signal.signal(each, _replaced.pop(each))  # type: ignore[arg-type]
    check()


def asked() -> Stopped | None:
    """Returns the first signal that has arrived; None if none has."""
    return next((Stopped(sent) for sent in _arrived()), None)


def check() -> None:
    """Raises Stopped if a signal has arrived."""
    if stopped := asked():
        raise stopped


def wait(seconds: float) -> None:
    """Returns after so many seconds, or at once when a signal has arrived; `check` is left to the caller."""
    select.select([_seen], [], [], seconds)


def sleep(seconds: float) -> None:
    """Waits so many seconds.

    Raises:
        Stopped: a signal has arrived, before or meanwhile.
    """
    wait(seconds)
    check()


def attended(work: Callable[[], Output]) -> Output:
    """Returns what `work` returns, or raises what it raises, while the main thread only receives signals.

    Where they are not listened to, `work` runs in this thread.

    Raises:
        Stopped: a signal has arrived before `work` began.
    """
    check()
    if not _replaced:
        return work()
    outputs: list[Output] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            outputs.append(work())
        except BaseException as error:
            errors.append(error)

    # A daemon, lest the interpreter waits for it where the main thread is made to end.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), name="work", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return outputs[0]


def at_end(correct: Callable[[Stopped], None]) -> None:
    """Registers a function that corrects what was said about the end, should a signal arrive after that."""
    _at_end.append(correct)


def end(status: int) -> None:
    """Ends the program with an exit status; a signal that has arrived, or does so from now on, has the last word.

    Where signals are not listened to, raises SystemExit only.
    """
    global _status
    if _replaced:
        _status = status  # from now on the handler ends the program at once
        if status not in EXIT_STATUS.values() and (stopped := asked()):
            _end_at_once(stopped)
    sys.exit(status)


def _receive(number: int, frame: FrameType | None) -> None:
    sent = signal.Signals(number)
    if _status is not None and _status not in EXIT_STATUS.values():
        _end_at_once(Stopped(sent))
    if sent != signal.SIGINT or (_presses and time.monotonic() - _presses[-1] < APART):
        return
    _presses.append(time.monotonic())
    if len(_presses) > PATIENT:
        os._exit(EXIT_STATUS[sent])  # all that this process has started ends with it
    if len(_presses) == PATIENT:
        os.write(2, b"\nstopping at the end of this step; once more stops at once\n")


def _arrived() -> list[signal.Signals]:
    try:
        numbers = _seen.recv(64, socket.MSG_PEEK)
    except BlockingIOError:
        return []
    return [signal.Signals(number) for number in numbers if number in EXIT_STATUS]


def _end_at_once(stopped: Stopped) -> None:
    global _status
    _status = stopped.exit_status
    try:
        for correct in _at_end:
            correct(stopped)
        os.write(2, f"convoy: {stopped}\n".encode())
    finally:
        os._exit(stopped.exit_status)


def _exit() -> None:
    """Leaves out the rest of the interpreter's end, during which signals have their default actions again."""
    if _status is not None:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):  # its reader is gone, or it is closed
                pass
        os._exit(_status)
