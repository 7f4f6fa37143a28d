"""Runs work that releases the interpreter lock, such as decoding images, on threads, with bounded memory."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

In = TypeVar("In")
Out = TypeVar("Out")

PENDING_PER_THREAD = 2  # items that are being worked on or wait for the consumer

READER_THREADS = 16
"""Threads for work that waits for a disk or a server rather than for a core."""


def in_order(
    function: Callable[[In], Out], items: Iterable[In], *, threads: int | None = None
) -> Generator[Out, None, None]:
    """Yields `function(item)` for each item, in order, like `map`; calls it on threads, for a few items ahead.

    Args:
        threads: None: one per core.
    """
    workers = threads or len(os.sched_getaffinity(0))
    pending: deque[Future[Out]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) >= PENDING_PER_THREAD * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
