"""What a reader of a split can do, wherever its images lie."""

from collections.abc import Iterable, Iterator
from typing import Protocol

from torch import Tensor

Batch = tuple[Tensor, Tensor]
"""Images uint8 [n, C, H, W] and labels int64 [n], in host memory; not to be written to."""


class SplitReader(Protocol):
    """One split of a dataset version, N images of one shape.

    All readers of a split give the same bits. `MappedSplit` has every shard here and mapped; `StreamedSplit` brings
    them when they are needed.
    """

    @property
    def labels(self) -> Tensor:
        """int64 [N]; where not all shards are here it may take a pass over them."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""

    def __len__(self) -> int: ...

    def gather(self, index: Tensor) -> Batch:
        """The images and labels at `index` (int64 [n]), in its order. Raises IndexError."""

    def slice(self, start: int, stop: int) -> Batch:
        """The images and labels from `start` up to, not including, `stop`, which is cut to N."""

    def batches(self, orders: Iterable[Tensor]) -> Iterator[Batch]:
        """`gather(row)` for the rows of each of some int64 [rows, n], one after another; made ahead if that helps."""

    def blocks(self, size: int, *, first: int = 0, every: int = 1) -> Iterator[Batch]:
        """The split cut into blocks of `size` images: number `first`, and every `every`-th from there on."""
