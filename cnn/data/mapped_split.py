"""Reads packed images from memory-mapped shards; a batch is one vectorised gather."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from cnn.data.shard_reader import RawShard
from cnn.data.split_reader import Batch
from cnn.errors import InputError


class Images(Protocol):
    """Images of one shape and their labels, such as a mapped shard."""

    @property
    def path(self) -> Path:
        """For messages."""

    @property
    def images(self) -> Tensor:
        """uint8 [n, C, H, W]; or what stands for the images, float32 likewise."""

    @property
    def labels(self) -> Tensor:
        """int64 [n]"""


class MappedSplit:
    """A split with all its shards on this machine; methods as in `cnn.data.split_reader.SplitReader`.

    The images stay on disk and are paged in when they are read; processes on one machine share the pages. Only the
    labels are copied to memory. `slice` returns a view of the file if its images are in one shard.

    Args:
        shards: the split's shards in reading order, at least one; files, or what is read from them.

    Raises:
        InputError: a file is no shard, or the shards differ in image shape.
    """

    def __init__(self, shards: Sequence[Path | Images]) -> None:
        if not shards:
            raise InputError("a packed split has at least one shard")
        mapped: list[Images] = [RawShard(shard) if isinstance(shard, Path) else shard for shard in shards]
        self._images = [shard.images for shard in mapped]
        self.labels = torch.cat([shard.labels for shard in mapped])
        """int64 [N]"""
        _, channels, height, width = self._images[0].shape
        self.shape = (channels, height, width)
        """(C, H, W) of an image."""
        for shard in mapped:
            if shard.images.shape[1:] != self._images[0].shape[1:]:
                raise InputError(
                    f"{shard.path}: its images are {tuple(shard.images.shape[1:])}, those before are {self.shape}"
                )
        self._ends = torch.tensor([len(images) for images in self._images]).cumsum(0)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def nbytes(self) -> int:
        """Bytes of all images."""
        return sum(images.nbytes for images in self._images)

    def gather(self, index: Tensor) -> Batch:
        labels = self.labels.index_select(0, index)
        if len(self._images) == 1:
            return self._images[0].index_select(0, index), labels
        order = index.argsort()
        ordered = index[order]
        stops = torch.searchsorted(ordered, self._ends).tolist()
        if stops[-1] < len(index):  # a negative index fails in index_select
            raise IndexError(f"index {int(ordered[-1])} is out of range for {len(self)} images")
        by_shard = torch.empty((len(index), *self.shape), dtype=torch.uint8)
        first = 0
        for images, end, stop in zip(self._images, self._ends.tolist(), stops, strict=True):
            if first < stop:  # one index_select per shard with any of the images
                local = ordered[first:stop] - (end - len(images))
                torch.index_select(images, 0, local, out=by_shard[first:stop])
            first = stop
        return by_shard.index_select(0, order.argsort()), labels  # index_copy_ is many times slower on uint8

    def slice(self, start: int, stop: int) -> Batch:
        stop = min(stop, len(self))
        parts, first = [], 0
        for images in self._images:
            low, high = max(start - first, 0), min(stop - first, len(images))
            if low < high:
                parts.append(images[low:high])
            first += len(images)
        if not parts:
            return torch.empty((0, *self.shape), dtype=torch.uint8), self.labels[:0]
        return parts[0] if len(parts) == 1 else torch.cat(parts), self.labels[start:stop]

    def batches(self, orders: Iterable[Tensor]) -> Iterator[Batch]:
        return (self.gather(row) for order in orders for row in order)

    def blocks(self, size: int, *, first: int = 0, every: int = 1) -> Iterator[Batch]:
        return (self.slice(start, start + size) for start in range(first * size, len(self), every * size))
