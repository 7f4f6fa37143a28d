"""Opens shards and reads images from them; compressed images are decoded when they are read."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cnn.config.preprocessing import Encoding
from cnn.data.manifest import Shard
from cnn.errors import InputError, NotAvailable

OPEN_ATTEMPTS = 20  # another process may remove a file from a shared cache after it was fetched and before it is open


class OpenShard(Protocol):
    """A mapped shard with n images of one shape; it stays readable after the file is removed."""

    path: Path
    labels: Tensor
    """int64 [n], mapped."""

    def read(self, index: Tensor, out: Tensor, rows: Tensor) -> None:
        """Copies the images at `index` (int64 [k], each in 0..n-1) one by one into the `rows` (int64 [k]) of `out`
        (uint8 [m, C, H, W], contiguous)."""


class RawShard:
    """A shard with `images` uint8 [n, C, H, W] and `labels` int64 [n]."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.images, self.labels = _tensors(path, "images", "labels")
        if (
            self.images.dtype != torch.uint8
            or self.images.ndim != 4
            or self.labels.dtype != torch.int64
            or self.labels.shape != self.images.shape[:1]
        ):
            raise InputError(f"{path} is not a shard: expected images uint8 [N, C, H, W] and labels int64 [N]")

    def read(self, index: Tensor, out: Tensor, rows: Tensor) -> None:
        for number, row in zip(index.tolist(), rows.tolist(), strict=True):
            out[row].copy_(self.images[number])

    def select(self, index: Tensor, out: Tensor) -> None:
        """Copies the images at `index` (int64 [k]) into `out` (uint8 [k, C, H, W], contiguous), in one operation."""
        torch.index_select(self.images, 0, index, out=out)


class EncodedShard:
    """A shard with `encoded` uint8 (all images' files, concatenated), `offsets` int64 [n+1] and `labels` int64 [n]."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._encoded, self._offsets, self.labels = _tensors(path, "encoded", "offsets", "labels")
        if (
            self._encoded.dtype != torch.uint8
            or self._encoded.ndim != 1
            or self._offsets.dtype != torch.int64
            or self.labels.dtype != torch.int64
            or self._offsets.shape != (len(self.labels) + 1,)
            or int(self._offsets[0]) != 0
            or int(self._offsets[-1]) != len(self._encoded)
            or bool((self._offsets.diff() <= 0).any())
        ):
            raise InputError(f"{path} is not a shard of encoded images: its offsets do not fit its bytes and labels")

    def read(self, index: Tensor, out: Tensor, rows: Tensor) -> None:
        from torchvision.io import ImageReadMode, decode_image  # slow to import

        mode = ImageReadMode.GRAY if out.shape[1] == 1 else ImageReadMode.RGB
        for number, row in zip(index.tolist(), rows.tolist(), strict=True):
            place = out[row]
            start, stop = self._offsets[number : number + 2].tolist()
            try:
                image = decode_image(self._encoded[start:stop], mode)
            except RuntimeError as error:
                why = str(error).splitlines()[0]
                raise InputError(f"{self.path}: its image {number} cannot be decoded ({why})") from error
            if image.shape != place.shape:
                raise InputError(
                    f"{self.path}: its image {number} is {tuple(image.shape)}, the manifest says {tuple(place.shape)}"
                )
            place.copy_(image)


def open_shard(path: Path, *, count: int, shape: tuple[int, int, int], encoding: Encoding) -> OpenShard:
    """Maps a shard.

    Raises:
        InputError: the file is damaged, or differs from the manifest.
    """
    shard = RawShard(path) if encoding == "raw" else EncodedShard(path)
    if isinstance(shard, RawShard) and shard.images.shape[1:] != shape:
        raise InputError(f"{path}: its images are {tuple(shard.images.shape[1:])}, the manifest says {shape}")
    if len(shard.labels) != count:
        raise InputError(f"{path}: it has {len(shard.labels)} images, the manifest says {count}")
    return shard


def fetch_and_open(
    shard: Shard, fetch: Callable[[Shard], Path], *, shape: tuple[int, int, int], encoding: Encoding
) -> OpenShard:
    """Fetches a shard and maps it immediately, since a mapped file stays readable after the cache has removed it.

    Args:
        fetch: fetches a shard into a local file and returns its path; may remove files that it returned earlier.

    Raises:
        InputError: the file is damaged, or differs from the manifest.
        NotAvailable: in all attempts the file was removed before it could be opened.
    """
    for _ in range(OPEN_ATTEMPTS):
        path = fetch(shard)
        try:
            return open_shard(path, count=shard.count, shape=shape, encoding=encoding)
        except InputError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
    raise NotAvailable(
        f"{path} was removed from the cache {OPEN_ATTEMPTS} times before it could be opened: other processes need more "
        "than the cache may hold; raise CONVOY_CACHE_BYTES"
    )


def _tensors(path: Path, *names: str) -> list[Tensor]:
    try:
        # Opened by descriptor: safetensors and torch each open the file again, and it may be removed in between.
        with path.open("rb") as opened, safe_open(f"/dev/fd/{opened.fileno()}", framework="pt") as file:
            return [file.get_tensor(name) for name in names]  # the tensors keep the mapping
    except (SafetensorError, FileNotFoundError) as error:
        raise InputError(f"{path} is not a whole shard ({error}); remove it, so that it is fetched again") from error
