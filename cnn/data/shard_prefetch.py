"""Fetches shards shortly before they are needed, and releases them afterwards."""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from torch import Tensor

from cnn.data.shard_reader import OpenShard

FETCH_THREADS = 4  # shards that are fetched in parallel; a large shard is itself fetched in parallel parts
TOUCH_SECONDS = 1.0
RELEASED_AGE_SECONDS = 3600.0  # set as the age of a file that this reader no longer needs


class Prefetch:
    """The open shards of a reader that goes through rows in order; a shard is open from its first to its last row.

    Files in use are touched, and released files look an hour old, so that a cache which removes the least recently used
    files removes released ones first. A file that it removes while in use stays readable here.

    Args:
        first, last: int64 [shards], the first and the last row that needs each shard; a shard with first > last is
            not needed.
        sizes: bytes of each shard.
        fetch: fetches and opens a shard, from any thread.
        ahead: bytes that may be fetched before the row that needs them.
    """

    def __init__(
        self, first: Tensor, last: Tensor, *, sizes: Sequence[int], fetch: Callable[[int], OpenShard], ahead: int
    ) -> None:
        self._first, self._last, self._sizes, self._fetch, self._ahead = first, last, sizes, fetch, ahead
        needed = (first <= last).nonzero().flatten()
        self._by_first: list[int] = needed[first[needed].argsort(stable=True)].tolist()
        self._by_last: list[int] = needed[last[needed].argsort(stable=True)].tolist()
        self._requested = self._started = 0  # shards of `_by_first`
        self._released = 0  # shards of `_by_last`
        self._bytes_ahead = 0
        self._open: dict[int, Future[OpenShard]] = {}
        self._touched = time.monotonic()
        self._pool = ThreadPoolExecutor(FETCH_THREADS, thread_name_prefix="shards")

    def move_to(self, row: int) -> None:
        """Releases the shards that only earlier rows need, and requests those of this row and the next rows."""
        while self._released < len(self._by_last) and int(self._last[self._by_last[self._released]]) < row:
            self._release(self._by_last[self._released])
            self._released += 1
        while self._started < self._requested and int(self._first[self._by_first[self._started]]) <= row:
            self._bytes_ahead -= self._sizes[self._by_first[self._started]]
            self._started += 1
        while self._requested < len(self._by_first):
            number = self._by_first[self._requested]
            if int(self._first[number]) <= row:
                self._started += 1
            elif self._bytes_ahead + self._sizes[number] > self._ahead:
                break
            else:
                self._bytes_ahead += self._sizes[number]
            self._open[number] = self._pool.submit(self._fetch, number)
            self._requested += 1
        if time.monotonic() - self._touched > TOUCH_SECONDS:
            self._touch_all()

    def __getitem__(self, number: int) -> OpenShard:
        """Returns a shard of the current row, after waiting for it; raises the error of fetching it."""
        return self._open[number].result()

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for number in list(self._open):
            self._release(number)

    def _release(self, number: int) -> None:
        future = self._open.pop(number)
        if future.done() and not future.cancelled() and not future.exception():
            path = future.result().path
            del future  # unmaps the file first: a mapped file takes disk space even after its removal
            _touch(path, RELEASED_AGE_SECONDS)

    def _touch_all(self) -> None:
        for future in self._open.values():
            if future.done() and not future.exception():
                _touch(future.result().path, 0.0)
        self._touched = time.monotonic()


def _touch(path: Path, age: float) -> None:
    when = time.time() - age
    with suppress(OSError):  # the file may be gone, or belong to another user
        os.utime(path, (when, when))
