"""Runs work on a thread that the process does not wait for when it ends."""

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

R = TypeVar("R")


def in_background(work: Callable[[], R]) -> Future[R]:
    """Starts `work` with the context variables of this thread; returns its result to be, or its error."""
    output: Future[R] = Future()

    def run() -> None:
        try:
            output.set_result(work())
        except BaseException as error:
            output.set_exception(error)

    threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True).start()
    return output
