"""The interface of all readers of splits."""

from collections.abc import Iterable, Iterator
from typing import Protocol

from torch import Tensor

Batch = tuple[Tensor, Tensor]
"""Images uint8 [n, C, H, W] and labels int64 [n], in host memory; do not write to them."""


class SplitReader(Protocol):
    """One split of a dataset version, N images of one shape.

    All readers of a split return the same bits. `MappedSplit` maps all shards from this machine's disk; `StreamedSplit`
    fetches each shard when it is needed.
    """

    @property
    def labels(self) -> Tensor:
        """int64 [N]. A reader that does not have all shards may have to fetch them."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""

    def __len__(self) -> int: ...

    def gather(self, index: Tensor) -> Batch:
        """Returns the images and labels at `index` (int64 [n], each in 0..N-1), in its order, in memory.

        Raises:
            IndexError: an index is out of range.
            InputError: a shard is damaged. An error of fetching it is raised as it is.
        """

    def slice(self, start: int, stop: int) -> Batch:
        """Returns the images and labels from `start` up to, not including, `stop`, which is cut to N."""

    def batches(self, orders: Iterable[Tensor]) -> Iterator[Batch]:
        """Yields `gather(row)` for all rows of each order (int64 [rows, n]), in sequence; may read ahead."""

    def blocks(self, size: int, *, first: int = 0, every: int = 1) -> Iterator[Batch]:
        """Cuts the split into blocks of `size` images; yields block `first`, and each `every`-th block after it."""
