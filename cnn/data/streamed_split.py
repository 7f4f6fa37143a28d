"""Reads a split of which this machine need not hold all shards: fetches them when needed, releases them afterwards."""

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
"""Bytes of shards that may be fetched before they are needed."""

READY_BYTES = 256 * 2**20  # batches that are gathered and decoded ahead of the one in use
MIN_READY_BATCHES, MAX_READY_BATCHES = 2, 16
OPEN_SHARDS = 8  # stay open after a gather or slice
IMAGES_PER_TASK = 8  # that a thread decodes or copies at a time
LARGE_IMAGE_BYTES = 16 * 2**10  # from here on, copying images one by one is faster than a bulk copy and a reordering
LOOKUP_POSITIONS = 1 << 20  # positions for which shard numbers are looked up at a time


class StreamedSplit:
    """A split whose shards are fetched when needed; methods as in `cnn.data.split_reader.SplitReader`.

    `batches` and `blocks` read ahead: threads fetch up to `ahead` bytes of shards before they are needed, and another
    thread gathers or decodes the next batches, so that a step finds its images ready. `gather` and `slice` wait for
    the shards that they need. An error of fetching or reading is raised in place of the batch that it affects.

    Args:
        shards: in reading order, as in the manifest; at least one.
        shape: (C, H, W) of an image.
        fetch: fetches a shard into a local file and returns its path; may remove files that it returned earlier.
            Called from several threads.
        ahead: bytes of shards.
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
        self._recent_shard = lru_cache(OPEN_SHARDS)(self._open_shard)
        self._labels: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return self._count

    @cached_property
    def labels(self) -> Tensor:
        """int64 [N]. Fetches the shards of which `blocks` has read nothing yet, one after another."""
        unknown = torch.ones(len(self._shards), dtype=torch.bool)
        unknown[list(self._labels)] = False
        row = torch.where(unknown, unknown.cumsum(0), 1)
        with self._prefetch(row, torch.where(unknown, row, 0)) as shards:
            for turn, number in enumerate(unknown.nonzero().flatten().tolist(), start=1):
                shards.move_to(turn)
                self._labels[number] = shards[number].labels.clone()
        return torch.cat([self._labels[number] for number in range(len(self._shards))])

    def gather(self, index: Tensor) -> Batch:
        return self._read(index, self._recent_shard)

    def slice(self, start: int, stop: int) -> Batch:
        return self.gather(torch.arange(start, max(start, min(stop, len(self)))))

    def batches(self, orders: Iterable[Tensor]) -> Iterator[Batch]:
        return self._ahead_of_use(self._batches(orders))

    def blocks(self, size: int, *, first: int = 0, every: int = 1) -> Iterator[Batch]:
        return self._ahead_of_use(self._blocks(size, first, every))

    def _ahead_of_use(self, batches: Generator[Batch, None, None]) -> Iterator[Batch]:
        """Yields the batches, and reads ahead as many as `READY_BYTES` allows if all are as large as the first."""
        head = next(batches, None)
        if head is None:
            return
        depth = min(max(READY_BYTES // max(head[0].nbytes, 1), MIN_READY_BATCHES), MAX_READY_BATCHES)
        yield head
        yield from read_ahead(batches, depth)

    def _batches(self, orders: Iterable[Tensor]) -> Generator[Batch, None, None]:
        for order in orders:
            with self._prefetch(*self._rows_of_shards(order)) as shards:
                for row, index in enumerate(order):
                    shards.move_to(row)
                    yield self._read(index, shards.__getitem__)

    def _blocks(self, size: int, first: int, every: int) -> Generator[Batch, None, None]:
        # Floor division, also of negative numbers: shards before the first block are not needed.
        needed_first = ((self._ends - self._sizes) // size - first + every - 1) // every
        needed_last = ((self._ends - 1) // size - first) // every
        with self._prefetch(needed_first, needed_last) as shards:
            for row, start in enumerate(range(first * size, len(self), every * size)):
                shards.move_to(row)
                index = torch.arange(start, min(start + size, len(self)))
                yield self._read(index, partial(self._shard_of_block, shards))

    def _shard_of_block(self, shards: Prefetch, number: int) -> OpenShard:
        """Returns a shard, and keeps its labels (8 bytes per image): callers of `blocks` often need them afterwards."""
        shard = shards[number]
        if number not in self._labels:
            self._labels[number] = shard.labels.clone()
        return shard

    def _prefetch(self, first: Tensor, last: Tensor) -> Prefetch:
        sizes = [shard.bytes for shard in self._shards]
        return Prefetch(first, last, sizes=sizes, fetch=self._open_shard, ahead=self._ahead)

    def _rows_of_shards(self, order: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the first and the last row that needs each shard: int64 [shards] each, first > last if none does."""
        first = torch.full((len(self._shards),), len(order))
        last = torch.full((len(self._shards),), -1)
        step = max(1, LOOKUP_POSITIONS // order.shape[1])
        for start in range(0, len(order), step):
            part = order[start : start + step]
            numbers = torch.searchsorted(self._ends, part, right=True).flatten()
            rows = torch.arange(start, start + len(part)).repeat_interleave(part.shape[1])
            first.scatter_reduce_(0, numbers, rows, "amin")
            last.scatter_reduce_(0, numbers, rows, "amax")
        return first, last

    def _open_shard(self, number: int) -> OpenShard:
        return fetch_and_open(self._shards[number], self._fetch, shape=self.shape, encoding=self._encoding)

    @torch.inference_mode(False)  # otherwise the readers' threads cannot write to tensors that are created here
    def _read(self, index: Tensor, shard_of: Callable[[int], OpenShard]) -> Batch:
        """Returns the images and labels at `index`; `shard_of` returns a shard by its number."""
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
        """Returns the parts' images, uint8 [n, C, H, W]: image i of all parts is row `order[i]`; `back` inverts it."""
        images = torch.empty((len(order), *self.shape), dtype=torch.uint8)
        counts = [len(local) for _, local in parts]
        shares = torch.split(images, counts)
        if images[0].nbytes < LARGE_IMAGE_BYTES and all(isinstance(shard, RawShard) for shard, _ in parts):
            for (shard, local), share in zip(parts, shares, strict=True):
                assert isinstance(shard, RawShard)
                shard.select(local, share)
            return images.index_select(0, back)
        rows = torch.split(order, counts)
        size = IMAGES_PER_TASK
        reads = [
            self._readers.submit(shard.read, some, images, some_rows)
            for (shard, local), part in zip(parts, rows, strict=True)
            for some, some_rows in zip(torch.split(local, size), torch.split(part, size), strict=True)
        ]
        for read in reads:
            read.result()
        return images

    @cached_property
    def _readers(self) -> ThreadPoolExecutor:
        """One thread per core, divided by the ranks of this machine."""
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // ranks), thread_name_prefix="read")
