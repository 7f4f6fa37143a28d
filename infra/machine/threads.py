"""Runs work on a few threads; the first error, or a signal, ends it."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from infra.machine import stopping

POLL_SECONDS = 0.5

T = TypeVar("T")
R = TypeVar("R")


def in_parallel(
    work: Callable[[T], R], items: Iterable[T], stop: threading.Event | None = None, *, threads: int = 8
) -> list[R]:
    """Returns `[work(item) for item in items]`, computed on a few threads.

    The first error, or a signal, sets `stop` and cancels items that have not begun. It is raised when the running items
    have ended.
    """
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            return [result_of(future) for future in futures]
        except BaseException:
            if stop:
                stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def result_of(future: Future[R]) -> R:
    """Waits for a result.

    Raises:
        Stopped: a signal has arrived before it was there.
    """
    while not future.done():
        stopping.check()
        wait([future], POLL_SECONDS)
    return future.result()
