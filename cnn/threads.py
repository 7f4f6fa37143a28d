"""Threads for work that releases the interpreter lock, such as decoding images, with bounded memory."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

In = TypeVar("In")
Out = TypeVar("Out")

AHEAD = 2  # items a worker that may be in flight or wait for the consumer

READERS = 16
"""Threads for work that waits for a disk or a server rather than for a core."""


def in_order(
    function: Callable[[In], Out], items: Iterable[In], *, threads: int | None = None
) -> Generator[Out, None, None]:
    """Like `map`, on several threads: results keep the items' order, few items are taken ahead of them.

    Args:
        threads: unset: one a core.
    """
    workers = threads or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    pending: deque[Future[Out]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) >= AHEAD * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
