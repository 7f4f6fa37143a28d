"""Shards brought here shortly before they are needed, and let go of when they are not any more."""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from torch import Tensor

from cnn.data.shard_reader import OpenShard

THREADS = 4  # shards that are fetched at once; a large one comes in several parts at a time already
TOUCH_EVERY = 1.0  # seconds
LET_GO = 3600.0  # seconds that a shard looks older than it is when nobody here needs it any more


class Prefetch:
    """The shards that a reader needs who goes through rows in order, each open from its first row to its last.

    A cache that drops the least recently used files finds those in use touched, and those that were let go of looking
    an hour old. What it drops all the same stays readable here.

    Args:
        first, last: int64 [shards], the rows in which each shard is needed first and last; one with first > last is
            not needed.
        sizes: bytes of each shard.
        bring: fetches and opens a shard, from any thread.
        ahead: bytes that may be here before their row has come.
    """

    def __init__(
        self, first: Tensor, last: Tensor, *, sizes: Sequence[int], bring: Callable[[int], OpenShard], ahead: int
    ) -> None:
        self._first, self._last, self._sizes, self._bring, self._ahead = first, last, sizes, bring, ahead
        needed = (first <= last).nonzero().flatten()
        self._coming: list[int] = needed[first[needed].argsort(stable=True)].tolist()
        self._going: list[int] = needed[last[needed].argsort(stable=True)].tolist()
        self._asked = self._begun = self._gone = 0  # how far down these lists things are
        self._bytes_ahead = 0
        self._here: dict[int, Future[OpenShard]] = {}
        self._touched = time.monotonic()
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="shards")

    def at(self, row: int) -> None:
        """The reader has come to this row: those of earlier rows alone go, and others are asked for."""
        while self._gone < len(self._going) and int(self._last[self._going[self._gone]]) < row:
            self._let_go(self._going[self._gone])
            self._gone += 1
        while self._begun < self._asked and int(self._first[self._coming[self._begun]]) <= row:
            self._bytes_ahead -= self._sizes[self._coming[self._begun]]
            self._begun += 1
        while self._asked < len(self._coming):
            number = self._coming[self._asked]
            if int(self._first[number]) <= row:
                self._begun += 1
            elif self._bytes_ahead + self._sizes[number] > self._ahead:
                break
            else:
                self._bytes_ahead += self._sizes[number]
            self._here[number] = self._pool.submit(self._bring, number)
            self._asked += 1
        if time.monotonic() - self._touched > TOUCH_EVERY:
            self._touch_all()

    def __getitem__(self, number: int) -> OpenShard:
        """A shard of the present row; waits until it is here, and raises what bringing it raised."""
        return self._here[number].result()

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for number in list(self._here):
            self._let_go(number)

    def _let_go(self, number: int) -> None:
        future = self._here.pop(number)
        if future.done() and not future.cancelled() and not future.exception():
            path = future.result().path
            del future  # first the mapping goes: a file that leaves while it is mapped still takes room
            _touch(path, LET_GO)

    def _touch_all(self) -> None:
        for future in self._here.values():
            if future.done() and not future.exception():
                _touch(future.result().path, 0.0)
        self._touched = time.monotonic()


def _touch(path: Path, age: float) -> None:
    when = time.time() - age
    with suppress(OSError):  # it may be gone, or somebody else's
        os.utime(path, (when, when))
