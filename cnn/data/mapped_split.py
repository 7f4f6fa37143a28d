"""Reading packed images: shards are memory-mapped, and a batch is one vectorised gather."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cnn.data.shard_reader import RawShard
from cnn.data.split_reader import Batch
from cnn.errors import InputError


class MappedSplit:
    """One split of a dataset version, N images of one shape, every shard of it here; see `cnn.data.split_reader`.

    The images stay on disk and are paged in as they are touched; processes on one machine share the pages.
    Only the labels are copied to memory. Do not write to the tensors that come from `slice`.

    Args:
        shards: the split's shards in reading order, at least one; files, or mapped already.

    Raises:
        InputError: a file is no shard, or the shards do not fit together.
    """

    def __init__(self, shards: Sequence[Path | RawShard]) -> None:
        if not shards:
            raise InputError("a packed split has at least one shard")
        mapped = [shard if isinstance(shard, RawShard) else RawShard(shard) for shard in shards]
        self._images = [shard.images for shard in mapped]
        self.labels = torch.cat([shard.labels for shard in mapped])
        """int64 [N]"""
        _, channels, height, width = self._images[0].shape
        self.shape = (channels, height, width)
        """(C, H, W) of an image."""
        for shard in mapped:
            if shard.images.shape[1:] != self._images[0].shape[1:]:
                raise InputError(
                    f"{shard.path}: its images are {tuple(shard.images.shape[1:])}, those before it {self.shape}"
                )
        self._ends = torch.tensor([len(images) for images in self._images]).cumsum(0)

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, index: Tensor) -> Batch:
        """The images and labels at `index`, in its order.

        Args:
            index: int64 [n], each in 0..N-1.

        Returns:
            uint8 [n, C, H, W] and int64 [n], both in memory.

        Raises:
            IndexError: an index is out of range.
        """
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
            if first < stop:  # one index_select a touched shard
                local = ordered[first:stop] - (end - len(images))
                torch.index_select(images, 0, local, out=by_shard[first:stop])
            first = stop
        return by_shard.index_select(0, order.argsort()), labels  # index_copy_ is many times slower on uint8

    def slice(self, start: int, stop: int) -> Batch:
        """The images and labels from `start` up to, not including, `stop`, which is cut to N.

        Returns:
            uint8 [n, C, H, W] and int64 [n]; a view of the mapped file where one shard holds them all.
        """
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
        """`gather(row)` for the rows of each of some int64 [rows, n], one after another."""
        return (self.gather(row) for order in orders for row in order)

    def blocks(self, size: int, *, first: int = 0, every: int = 1) -> Iterator[Batch]:
        """The split cut into blocks of `size` images: number `first`, and every `every`-th from there on."""
        return (self.slice(start, start + size) for start in range(first * size, len(self), every * size))
