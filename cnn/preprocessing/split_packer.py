"""Packing one split: its images into shards, and of each shard a record that packing can go on from."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cnn.data.manifest import Shard, Unreadable
from cnn.data.shard_writer import Images, ShardWriter, shard_path
from cnn.data.splits import Split
from cnn.preprocessing.pixel_statistics import Moments, PixelSums
from cnn.preprocessing.resume_records import PackedShard

EXAMPLES = 20
"""Unreadable images that are named in the report."""

OnShard = Callable[[PackedShard, Path], object]
"""Called with each finished shard and its file, which is the callee's from then on; what it raises ends the packing."""


class Failure(NamedTuple):
    """An image that could not be read."""

    position: int
    """In the source."""

    image: Unreadable | None
    """None beyond the examples that are named."""


class SplitPacker:
    """Takes the images of one split in the source's order.

    In memory are one shard, some 40 bytes for each image in it, and the positions of unreadable images.

    Args:
        folder: where `writer` puts its shards.
        shape: (C, H, W) of an image.
        done: the split's shards that an earlier process finished, from the first on without a gap.
    """

    def __init__(
        self,
        split: Split,
        writer: ShardWriter,
        folder: Path,
        shape: tuple[int, int, int],
        done: Iterable[PackedShard],
        on_shard: OnShard,
    ) -> None:
        self._split, self._writer, self._folder, self._on_shard = split, writer, folder, on_shard
        self._pixels = shape[1] * shape[2]
        self._shards: list[Shard] = []
        self._sums = PixelSums(sums=(0,) * shape[0], squares=(0,) * shape[0])
        self._positions: list[NDArray[np.int64]] = []  # of the images that are in no shard yet
        self._moments: list[Moments] = []
        self._waiting: list[Failure] = []  # that are in no record yet
        self.failures: list[Failure] = []
        """All unreadable images so far."""
        self.stop = 0
        """Position in the source up to which the split's images are in finished shards."""
        for packed in done:
            named: list[Unreadable | None] = [*packed.examples]
            named += [None] * (len(packed.unreadable) - len(named))
            self.failures += map(Failure, packed.unreadable, named)
            self._enter(packed)

    @property
    def sums(self) -> PixelSums:
        """Over the images in finished shards."""
        return self._sums

    def skip(self, positions: Sequence[int], unreadable: Sequence[Unreadable]) -> None:
        """Unreadable images, before any later ones of the split are added."""
        for position, image in zip(positions, unreadable, strict=True):
            failure = Failure(position, image if len(self.failures) < EXAMPLES else None)
            self.failures.append(failure)
            self._waiting.append(failure)

    def add(self, images: Images, labels: NDArray[np.int64], positions: NDArray[np.int64], moments: Moments) -> None:
        """Append n images; each argument has n entries."""
        if not len(labels):
            return
        self._positions.append(positions)
        self._moments.append(moments)
        for shard in self._writer.add(images, labels):
            self._record(shard)

    def close(self) -> tuple[Shard, ...]:
        """Write what is left; returns the split's shards in order."""
        before = sum(map(len, self._positions))
        if before:
            self._record(self._writer.close()[-1])
        return tuple(self._shards)

    def _record(self, shard: Shard) -> None:
        """Take the shard's images off those that wait, and tell of it."""
        positions, moments = np.concatenate(self._positions), np.concatenate(self._moments)
        self._positions, self._moments = [positions[shard.count :]], [moments[shard.count :]]
        stop = int(positions[shard.count - 1]) + 1
        entered = [failure for failure in self._waiting if failure.position < stop]
        self._waiting = self._waiting[len(entered) :]
        packed = PackedShard(
            split=self._split,
            number=len(self._shards),
            shard=shard,
            stop=stop,
            sums=PixelSums.of(moments[: shard.count], self._pixels),
            unreadable=tuple(failure.position for failure in entered),
            examples=tuple(failure.image for failure in entered if failure.image),
        )
        self._enter(packed)
        self._on_shard(packed, shard_path(self._folder, shard.sha256))

    def _enter(self, packed: PackedShard) -> None:
        self._shards.append(packed.shard)
        self._sums += packed.sums
        self.stop = packed.stop
