"""Packs the images of one split into shards, and records each shard so that packing can be resumed after it."""

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

MAX_EXAMPLES = 20
"""Number of unreadable images that the report names."""

OnShard = Callable[[PackedShard, Path], object]
"""Called with each finished shard and its file, which it may move or delete; its errors end the packing."""


class Failure(NamedTuple):
    """An image that could not be read."""

    position: int
    """Position in the source."""

    image: Unreadable | None
    """None for images after the first `MAX_EXAMPLES`."""


class SplitPacker:
    """Packs the images of one split, which are added in the source's order.

    Memory holds one shard, some 40 bytes per image of it, and the positions of unreadable images.

    Args:
        folder: the folder to which `writer` writes shards.
        shape: (C, H, W) of an image.
        done: the split's shards that an earlier process has finished, from the first on without a gap.
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
        self.sums = PixelSums(sums=(0,) * shape[0], squares=(0,) * shape[0])
        """Sums over the images in finished shards."""
        self._positions: list[NDArray[np.int64]] = []  # of the images that are in no shard yet
        self._moments: list[Moments] = []
        self._unrecorded: list[Failure] = []  # in no `PackedShard` yet
        self.failures: list[Failure] = []
        """All unreadable images so far."""
        self.stop = 0
        """Position in the source up to which the split's images are in finished shards."""
        for packed in done:
            named: list[Unreadable | None] = [*packed.examples]
            named += [None] * (len(packed.unreadable) - len(named))
            self.failures += map(Failure, packed.unreadable, named)
            self._append(packed)

    def skip(self, positions: Sequence[int], unreadable: Sequence[Unreadable]) -> None:
        """Notes unreadable images; call it before later images of the split are added."""
        for position, image in zip(positions, unreadable, strict=True):
            failure = Failure(position, image if len(self.failures) < MAX_EXAMPLES else None)
            self.failures.append(failure)
            self._unrecorded.append(failure)

    def add(self, images: Images, labels: NDArray[np.int64], positions: NDArray[np.int64], moments: Moments) -> None:
        """Appends n images; each argument has n entries."""
        if not len(labels):
            return
        self._positions.append(positions)
        self._moments.append(moments)
        for shard in self._writer.each_shard_of(images, labels):
            self._record(shard)

    def close(self) -> tuple[Shard, ...]:
        """Writes the last shard; returns the split's shards in order."""
        if any(map(len, self._positions)):
            self._record(self._writer.close()[-1])
        return tuple(self._shards)

    def _record(self, shard: Shard) -> None:
        """Records a shard: moves its images out of the lists of waiting images, and calls `on_shard`."""
        positions, moments = np.concatenate(self._positions), np.concatenate(self._moments)
        self._positions, self._moments = [positions[shard.count :]], [moments[shard.count :]]
        stop = int(positions[shard.count - 1]) + 1
        recorded = [failure for failure in self._unrecorded if failure.position < stop]
        self._unrecorded = self._unrecorded[len(recorded) :]
        packed = PackedShard(
            split=self._split,
            number=len(self._shards),
            shard=shard,
            stop=stop,
            sums=PixelSums.of(moments[: shard.count], self._pixels),
            unreadable=tuple(failure.position for failure in recorded),
            examples=tuple(failure.image for failure in recorded if failure.image),
        )
        self._append(packed)
        self._on_shard(packed, shard_path(self._folder, shard.sha256))

    def _append(self, packed: PackedShard) -> None:
        self._shards.append(packed.shard)
        self.sums += packed.sums
        self.stop = packed.stop
