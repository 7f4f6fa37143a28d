"""Writing packed images as shards named by their digest.

The format is safetensors: https://github.com/huggingface/safetensors. Every shard has `labels` int64 [n], and

- raw: `images` uint8 [n, C, H, W];
- jpeg, webp: `encoded` uint8, the files of all images one after another, and `offsets` int64 [n+1]: image i is
  `encoded[offsets[i]:offsets[i + 1]]`.
"""

import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from cnn.config.preprocessing import Encoding
from cnn.data.manifest import Shard
from cnn.data.splits import Pixels

SHARD_BYTES = 64 * 2**20
"""Images in a full shard: so large that requests do not matter, so small that one a split fits in memory."""

Images = Pixels | Sequence[bytes]
"""n images: pixels [n, C, H, W], or files of them."""


class ShardWriter:
    """Collects the images of one split and writes a shard whenever the next image does not fit any more.

    Where one shard ends and the next begins depends on the images only, not on how they arrive, so equal images in
    equal order give byte-equal shards. At most one shard is held in memory.

    Args:
        folder: where `<sha256>.safetensors` files appear, each complete.
        shape: (C, H, W) of an image.
        encoding: of the images that are added.
        shard_bytes: images in a full shard; at least one image is in it.
    """

    def __init__(
        self,
        folder: Path,
        shape: tuple[int, int, int],
        *,
        encoding: Encoding = "raw",
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self._folder = folder
        self._buffer: _Buffer = _Raw(shape, shard_bytes) if encoding == "raw" else _Encoded(shard_bytes)
        self._labels: list[NDArray[np.int64]] = []
        self._shards: list[Shard] = []

    def add(self, images: Images, labels: NDArray[np.int64]) -> list[Shard]:
        """Append n images and labels [n]; returns the shards that were written."""
        start, before = 0, len(self._shards)
        while start < len(images):
            taken = self._buffer.take(images[start:])
            self._labels.append(np.asarray(labels[start : start + taken], dtype=np.int64))
            start += taken
            if start < len(images):
                self._write()
        return self._shards[before:]

    def close(self) -> tuple[Shard, ...]:
        """Write what is left; returns all shards in order."""
        if self._labels:
            self._write()
        return tuple(self._shards)

    def _write(self) -> None:
        labels, self._labels = np.concatenate(self._labels), []
        handle, temporary = tempfile.mkstemp(dir=self._folder, suffix=".tmp")
        os.close(handle)
        save_file({**self._buffer.give(), "labels": labels}, temporary)
        with open(temporary, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        size = os.path.getsize(temporary)
        os.replace(temporary, shard_path(self._folder, sha256))
        self._shards.append(Shard(sha256=sha256, count=len(labels), bytes=size))


def shard_path(folder: Path, sha256: str) -> Path:
    """Where `ShardWriter` puts the shard with this digest."""
    return folder / f"{sha256}.safetensors"


class _Buffer(Protocol):
    """The images of the shard to be written next."""

    def take(self, images: Any) -> int:
        """Copy in the first ones that fit; returns how many."""

    def give(self) -> dict[str, NDArray[Any]]:
        """The shard's tensors; the buffer is empty from now on, and they are good until the next `take`."""


class _Raw:
    def __init__(self, shape: tuple[int, int, int], shard_bytes: int) -> None:
        self._images = np.empty((max(1, shard_bytes // int(np.prod(shape))), *shape), dtype=np.uint8)
        self._filled = 0

    def take(self, images: Pixels) -> int:
        count = min(len(images), len(self._images) - self._filled)
        self._images[self._filled : self._filled + count] = images[:count]
        self._filled += count
        return count

    def give(self) -> dict[str, NDArray[Any]]:
        count, self._filled = self._filled, 0
        return {"images": self._images[:count]}


class _Encoded:
    def __init__(self, shard_bytes: int) -> None:
        self._most = shard_bytes
        self._files: list[bytes] = []
        self._bytes = 0

    def take(self, images: Sequence[bytes]) -> int:
        before = len(self._files)
        for file in images:
            if self._files and self._bytes + len(file) > self._most:
                break
            self._files.append(file)
            self._bytes += len(file)
        return len(self._files) - before

    def give(self) -> dict[str, NDArray[Any]]:
        offsets = np.cumsum([0, *map(len, self._files)], dtype=np.int64)
        encoded = np.frombuffer(b"".join(self._files), dtype=np.uint8)
        self._files, self._bytes = [], 0
        return {"encoded": encoded, "offsets": offsets}
