"""Reading a split whose shards are not all here: they come when they are needed, and may go afterwards."""

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from cnn.config.preprocessing import Encoding
from cnn.data.manifest import Shard
from cnn.data.read_ahead import read_ahead
from cnn.data.shard_prefetch import Prefetch
from cnn.data.shard_reader import OpenShard, RawShard, fetch_and_open
from cnn.data.split_reader import Batch
from cnn.errors import InputError

AHEAD_BYTES = 2 * 2**30
"""Shards that may be fetched before they are needed."""

BATCHES_BYTES = 256 * 2**20  # batches that are gathered and decoded ahead of the one in use
BATCHES = 2, 16  # at least and at most so many of them
KEPT = 8  # shards that stay open after a gather or slice out of turn
READ_TOGETHER = 8  # images that a thread decodes or copies at a time
LARGE = 16 * 2**10  # bytes of an image from which on copying one by one is quicker than all at once, and again in order
LOOKED_AT = 1 << 20  # positions turned into shard numbers at a time


class StreamedSplit:
    """One split of a dataset version, N images of one shape (see `cnn.data.split_reader.SplitReader`).

    `batches` and `blocks` know what comes: they fetch shards on threads, up to `ahead` bytes before they are needed,
    and gather or decode the next batches on another, so that a step finds its images ready. `gather` and `slice`
    fetch what they need and wait for it. What cannot be fetched or read is raised where the reader gets to it.

    Args:
        shards: in reading order, as in the manifest; at least one.
        shape: (C, H, W) of an image.
        fetch: makes a shard a local file and returns its path; called from several threads. It may remove files that
            it has given out earlier.
        ahead: bytes.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        shape: tuple[int, int, int],
        fetch: Callable[[Shard], Path],
        *,
        encoding: Encoding = "raw",
        ahead: int = AHEAD_BYTES,
    ) -> None:
        if not shards:
            raise InputError("a packed split has at least one shard")
        self.shape = shape
        self._shards, self._fetch, self._encoding, self._ahead = shards, fetch, encoding, ahead
        self._sizes = torch.tensor([shard.count for shard in shards])
        self._ends = self._sizes.cumsum(0)
        self._count = int(self._ends[-1])
        self._kept = lru_cache(KEPT)(self._bring)
        self._labels: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return self._count

    @cached_property
    def labels(self) -> Tensor:
        """int64 [N]. Shards that no block has been read of are brought here for it, one after another."""
        unknown = torch.ones(len(self._shards), dtype=torch.bool)
        unknown[list(self._labels)] = False
        row = torch.where(unknown, unknown.cumsum(0), 1)
        with self._prefetch(row, torch.where(unknown, row, 0)) as shards:
            for turn, number in enumerate(unknown.nonzero().flatten().tolist(), start=1):
                shards.at(turn)
                self._labels[number] = shards[number].labels.clone()
        return torch.cat([self._labels[number] for number in range(len(self._shards))])

    def gather(self, index: Tensor) -> Batch:
        """The images and labels at `index`, in its order.

        Args:
            index: int64 [n], each in 0..N-1.

        Returns:
            uint8 [n, C, H, W] and int64 [n], both in memory.

        Raises:
            IndexError: an index is out of range.
            InputError: a shard is damaged; also what fetching it raises.
        """
        return self._read(index, self._kept)

    def slice(self, start: int, stop: int) -> Batch:
        """The images and labels from `start` up to, not including, `stop`, which is cut to N; as `gather`."""
        return self.gather(torch.arange(start, max(start, min(stop, len(self)))))

    def batches(self, orders: Iterable[Tensor]) -> Iterator[Batch]:
        """`gather(row)` for the rows of each of some int64 [rows, n], one after another, made ahead."""
        return self._made_ahead(self._batches(orders))

    def blocks(self, size: int, *, first: int = 0, every: int = 1) -> Iterator[Batch]:
        """The split in blocks of `size` images: number `first`, and every `every`-th from there on, made ahead."""
        return self._made_ahead(self._blocks(size, first, every))

    def _made_ahead(self, batches: Generator[Batch, None, None]) -> Iterator[Batch]:
        """They are as large as the first one is."""
        head = next(batches, None)
        if head is None:
            return
        least, most = BATCHES
        depth = min(max(BATCHES_BYTES // max(head[0].nbytes, 1), least), most)
        following = read_ahead(batches, depth)
        yield head
        yield from following

    def _batches(self, orders: Iterable[Tensor]) -> Generator[Batch, None, None]:
        for order in orders:
            with self._prefetch(*self._rows_of_shards(order)) as shards:
                for row, index in enumerate(order):
                    shards.at(row)
                    yield self._read(index, shards.__getitem__)

    def _blocks(self, size: int, first: int, every: int) -> Generator[Batch, None, None]:
        # Floor division, also of negative numbers: what lies before the first block is not needed.
        needed_first = ((self._ends - self._sizes) // size - first + every - 1) // every
        needed_last = ((self._ends - 1) // size - first) // every
        with self._prefetch(needed_first, needed_last) as shards:
            for row, start in enumerate(range(first * size, len(self), every * size)):
                shards.at(row)
                index = torch.arange(start, min(start + size, len(self)))
                yield self._read(index, partial(self._with_labels_noted, shards))

    def _with_labels_noted(self, shards: Prefetch, number: int) -> OpenShard:
        """They are 8 bytes an image, and whoever reads block by block often asks for them afterwards."""
        shard = shards[number]
        if number not in self._labels:
            self._labels[number] = shard.labels.clone()
        return shard

    def _prefetch(self, first: Tensor, last: Tensor) -> Prefetch:
        sizes = [shard.bytes for shard in self._shards]
        return Prefetch(first, last, sizes=sizes, bring=self._bring, ahead=self._ahead)

    def _rows_of_shards(self, order: Tensor) -> tuple[Tensor, Tensor]:
        """The first and the last row that needs each shard; int64 [shards] each, first > last if none does."""
        first = torch.full((len(self._shards),), len(order))
        last = torch.full((len(self._shards),), -1)
        rows_together = max(1, LOOKED_AT // order.shape[1])
        for start in range(0, len(order), rows_together):
            part = order[start : start + rows_together]
            numbers = torch.searchsorted(self._ends, part, right=True).flatten()
            rows = torch.arange(start, start + len(part)).repeat_interleave(part.shape[1])
            first.scatter_reduce_(0, numbers, rows, "amin")
            last.scatter_reduce_(0, numbers, rows, "amax")
        return first, last

    def _bring(self, number: int) -> OpenShard:
        return fetch_and_open(self._shards[number], self._fetch, shape=self.shape, encoding=self._encoding)

    @torch.inference_mode(False)  # else the readers' threads may not write to what is made here
    def _read(self, index: Tensor, shard_of: Callable[[int], OpenShard]) -> Batch:
        """Images and labels at `index`, from shards by their numbers."""
        labels = torch.empty(len(index), dtype=torch.int64)
        if not len(index):
            return torch.empty((0, *self.shape), dtype=torch.uint8), labels
        ordered, order = index.sort()
        if int(ordered[0]) < 0 or int(ordered[-1]) >= len(self):
            raise IndexError(
                f"an index of {int(ordered[0])} … {int(ordered[-1])} is out of range for {len(self)} images"
            )
        numbers, counts = torch.unique_consecutive(
            torch.searchsorted(self._ends, ordered, right=True), return_counts=True
        )
        parts: list[tuple[OpenShard, Tensor]] = []
        start = 0
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            stop = start + count
            shard, local = shard_of(number), ordered[start:stop] - (self._ends[number] - self._sizes[number])
            torch.index_select(shard.labels, 0, local, out=labels[start:stop])
            parts.append((shard, local))
            start = stop
        back = order.argsort()
        return self._images(parts, order, back), labels.index_select(0, back)

    def _images(self, parts: Sequence[tuple[OpenShard, Tensor]], order: Tensor, back: Tensor) -> Tensor:
        """Images of some shards, uint8 [n, C, H, W]: number i of all parts as row `order[i]`; `back` is its inverse."""
        images = torch.empty((len(order), *self.shape), dtype=torch.uint8)
        counts = [len(local) for _, local in parts]
        shares = torch.split(images, counts)
        if images[0].nbytes < LARGE and all(isinstance(shard, RawShard) for shard, _ in parts):
            for (shard, local), share in zip(parts, shares, strict=True):
                assert isinstance(shard, RawShard)
                shard.select(local, share)
            return images.index_select(0, back)
        rows = torch.split(order, counts)
        waiting = [
            self._readers.submit(shard.read, some, images, some_rows)
            for (shard, local), part in zip(parts, rows, strict=True)
            for some, some_rows in zip(torch.split(local, READ_TOGETHER), torch.split(part, READ_TOGETHER), strict=True)
        ]
        for each in waiting:
            each.result()
        return images

    @cached_property
    def _readers(self) -> ThreadPoolExecutor:
        """Threads that share the cores with the other ranks of this machine."""
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // ranks), thread_name_prefix="read")
