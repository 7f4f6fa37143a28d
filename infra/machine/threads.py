"""Work on a few threads; the first error ends it."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_parallel(work: Callable[[T], R], items: Iterable[T], stop: threading.Event | None = None) -> list[R]:
    """`[work(item) for item in items]` on a few threads.

    The first error, or an interrupt, sets `stop`, drops what has not begun, and is raised when the others have ended.
    """
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            if stop:
                stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
