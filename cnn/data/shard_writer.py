"""Writes packed images as shards that are named by their digest.

The format is safetensors: https://github.com/huggingface/safetensors. Every shard has `labels` int64 [n], and

- raw: `images` uint8 [n, C, H, W];
- jpeg, webp: `encoded` uint8, the files of all images, concatenated, and `offsets` int64 [n+1]: image i is
  `encoded[offsets[i]:offsets[i + 1]]`.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from cnn.config.preprocessing import Encoding
from cnn.data.manifest import Shard
from cnn.data.splits import Pixels

SHARD_BYTES = 64 * 2**20
"""Bytes of images in a full shard: large enough to amortise requests, small enough to hold one per split in memory."""

Images = Pixels | Sequence[bytes]
"""n images: pixels [n, C, H, W], or n compressed files."""


class ShardWriter:
    """Collects the images of one split, and writes a shard when the next image does not fit into it.

    The boundaries of shards depend on the images only, not on how many are added at a time, so equal images in equal
    order give byte-equal shards. At most one shard is held in memory.

    Args:
        folder: gets the `<sha256>.safetensors` files; a file is complete when it appears there.
        shape: (C, H, W) of an image.
        encoding: of the images that are added.
        shard_bytes: bytes of images in a full shard; a shard has at least one image.
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
        raw = encoding == "raw"
        self._buffer: _RawBuffer | _EncodedBuffer = (
            _RawBuffer(shape, shard_bytes) if raw else _EncodedBuffer(shard_bytes)
        )
        self._labels: list[NDArray[np.int64]] = []
        self._shards: list[Shard] = []

    def add(self, images: Images, labels: NDArray[np.int64]) -> list[Shard]:
        """Appends n images and labels [n]; returns the shards that were written."""
        return list(self.each_shard_of(images, labels))

    def each_shard_of(self, images: Images, labels: NDArray[np.int64]) -> Iterator[Shard]:
        """Appends n images and labels [n], if it is used up; yields each shard before its file can be replaced."""
        start = 0
        while start < len(images):
            count = self._buffer.append(images[start:])
            self._labels.append(np.asarray(labels[start : start + count], dtype=np.int64))
            start += count
            if start < len(images):
                self._write()
                yield self._shards[-1]

    def close(self) -> tuple[Shard, ...]:
        """Writes the last shard; returns all shards in order."""
        if self._labels:
            self._write()
        return tuple(self._shards)

    def _write(self) -> None:
        labels, self._labels = np.concatenate(self._labels), []
        handle, temporary = tempfile.mkstemp(dir=self._folder, suffix=".tmp")
        os.close(handle)
        save_file({**self._buffer.flush(), "labels": labels}, temporary)
        with open(temporary, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        size = os.path.getsize(temporary)
        os.replace(temporary, shard_path(self._folder, sha256))
        self._shards.append(Shard(sha256=sha256, count=len(labels), bytes=size))


def shard_path(folder: Path, sha256: str) -> Path:
    """Returns the path to which `ShardWriter` writes the shard with this digest."""
    return folder / f"{sha256}.safetensors"


class _RawBuffer:
    """The images of the next shard."""

    def __init__(self, shape: tuple[int, int, int], shard_bytes: int) -> None:
        self._images = np.empty((max(1, shard_bytes // int(np.prod(shape))), *shape), dtype=np.uint8)
        self._filled = 0

    def append(self, images: Any) -> int:
        """Copies the first images, as many as fit; returns their number."""
        count = min(len(images), len(self._images) - self._filled)
        self._images[self._filled : self._filled + count] = images[:count]
        self._filled += count
        return count

    def flush(self) -> dict[str, NDArray[Any]]:
        """Empties the buffer; returns the shard's tensors, which are valid until the next `append`."""
        count, self._filled = self._filled, 0
        return {"images": self._images[:count]}


class _EncodedBuffer:
    """The compressed images of the next shard; methods as in `_RawBuffer`."""

    def __init__(self, shard_bytes: int) -> None:
        self._shard_bytes = shard_bytes
        self._files: list[bytes] = []
        self._bytes = 0

    def append(self, images: Any) -> int:
        before = len(self._files)
        for file in images:
            if self._files and self._bytes + len(file) > self._shard_bytes:
                break
            self._files.append(file)
            self._bytes += len(file)
        return len(self._files) - before

    def flush(self) -> dict[str, NDArray[Any]]:
        offsets = np.cumsum([0, *map(len, self._files)], dtype=np.int64)
        encoded = np.frombuffer(b"".join(self._files), dtype=np.uint8)
        self._files, self._bytes = [], 0
        return {"encoded": encoded, "offsets": offsets}
