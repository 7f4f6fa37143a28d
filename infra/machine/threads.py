"""Runs work on a few threads; the first error ends it."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_parallel(
    work: Callable[[T], R], items: Iterable[T], stop: threading.Event | None = None, *, threads: int = 8
) -> list[R]:
    """Returns `[work(item) for item in items]`, computed on a few threads.

    The first error, or an interrupt, sets `stop` and cancels items that have not begun. It is raised when the running
    items have ended.
    """
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            if stop:
                stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
