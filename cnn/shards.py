"""Writing packed images as shards named by their digest.

The format is safetensors: https://github.com/huggingface/safetensors
"""

import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from cnn.manifest import Shard
from cnn.sources.block import Pixels

SHARD_BYTES = 64 * 2**20
"""Pixels in a full shard: so large that requests do not matter, so small that one a split fits in memory."""


class ShardWriter:
    """Collects the images of one split and writes a shard whenever enough have come.

    Where one shard ends and the next begins depends on the number of images only, not on how they arrive, so
    equal images in equal order give byte-equal shards. At most one shard is held in memory.

    Args:
        folder: where `<sha256>.safetensors` files appear, each complete.
        shape: (C, H, W) of an image.
        shard_bytes: pixels in a full shard; at least one image is in it.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int], *, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder = folder
        capacity = max(1, shard_bytes // int(np.prod(shape)))
        self._images = np.empty((capacity, *shape), dtype=np.uint8)
        self._labels = np.empty(capacity, dtype=np.int64)
        self._filled = 0
        self._shards: list[Shard] = []

    def add(self, images: Pixels, labels: NDArray[np.int64]) -> None:
        """Append images [n, C, H, W] and labels [n]."""
        start = 0
        while start < len(images):
            count = min(len(images) - start, len(self._images) - self._filled)
            place, taken = slice(self._filled, self._filled + count), slice(start, start + count)
            self._images[place], self._labels[place] = images[taken], labels[taken]
            self._filled, start = place.stop, taken.stop
            if self._filled == len(self._images):
                self._write()

    def close(self) -> tuple[Shard, ...]:
        """Write what is left; returns all shards in order."""
        if self._filled:
            self._write()
        return tuple(self._shards)

    def _write(self) -> None:
        handle, temporary = tempfile.mkstemp(dir=self._folder, suffix=".tmp")
        os.close(handle)
        tensors: dict[str, np.ndarray] = {
            "images": self._images[: self._filled],
            "labels": self._labels[: self._filled],
        }
        save_file(tensors, temporary)
        with open(temporary, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        size = os.path.getsize(temporary)
        os.replace(temporary, shard_path(self._folder, sha256))
        self._shards.append(Shard(sha256=sha256, count=self._filled, bytes=size))
        self._filled = 0


def shard_path(folder: Path, sha256: str) -> Path:
    """Where `ShardWriter` puts the shard with this digest."""
    return folder / f"{sha256}.safetensors"


class PixelSums:
    """Mean and standard deviation of each channel, from exact integer sums, whatever the images' order."""

    def __init__(self, channels: int) -> None:
        self._count = 0
        self._sums = [0] * channels
        self._squares = [0] * channels

    def add(self, images: Pixels) -> None:
        """Take in images [n, C, H, W]."""
        self._count += images[:, 0].size
        for channel in range(len(self._sums)):
            values = np.bincount(images[:, channel].reshape(-1), minlength=256)
            self._sums[channel] += int(values @ _LEVELS)
            self._squares[channel] += int(values @ _LEVELS**2)

    def mean(self) -> tuple[float, ...]:
        """On the scale 0..1."""
        return tuple(total / (255 * self._count) for total in self._sums)

    def std(self) -> tuple[float, ...]:
        """On the scale 0..1; at least one grey level, so that a constant channel can be divided by it."""
        variances = (
            (squares * self._count - total**2) / self._count**2
            for total, squares in zip(self._sums, self._squares, strict=True)
        )
        return tuple(max(1.0, float(np.sqrt(variance))) / 255 for variance in variances)


_LEVELS = np.arange(256, dtype=np.int64)
