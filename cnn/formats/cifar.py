"""Reads the binary versions of CIFAR-10 and CIFAR-100 (https://www.cs.toronto.edu/~kriz/cifar.html).

The Python versions are pickles, and are never opened.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from cnn.data.splits import TEST, TRAIN
from cnn.errors import InputError
from cnn.formats.block import PixelBlock, UnnamedImages
from cnn.formats.layout import LeftOut
from cnn.formats.tar import tar_stream

BLOCK_IMAGES = 1000  # 3 MB

_PIXELS = 3 * 32 * 32
_NAME_LIST_MAX_BYTES = 65536


class _Layout(NamedTuple):
    names: str  # the member that lists the classes
    label_bytes: int  # before each image; the last byte is the label


_CIFAR10 = _Layout("batches.meta.txt", 1)
_CIFAR100 = _Layout("fine_label_names.txt", 2)  # coarse label, fine label


class CifarImages(UnnamedImages):
    """The images of a tar archive, compressed or not, of the binary version; members are read from its stream.

    Raises:
        InputError: the archive is damaged, truncated, or not the binary version.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        if len(files) != 1:
            raise InputError(f"CIFAR's binary version is one tar archive, found {len(files)} files")
        ((self._name, self._path),) = files.items()
        sizes: dict[str, int] = {}
        lists: dict[str, tuple[str, ...]] = {}
        with tar_stream(self._name, self._path) as members:
            for member, reader in members:
                base = PurePosixPath(member.name).name
                sizes[base] = member.size
                if base in (_CIFAR10.names, _CIFAR100.names):
                    lists[base] = tuple(reader.read(_NAME_LIST_MAX_BYTES).decode("utf-8", "replace").split())
        layout = next((layout for layout in (_CIFAR10, _CIFAR100) if layout.names in lists), None)
        if layout is None:
            kind = "Python version, a pickle" if {"batches.meta", "meta"} & sizes.keys() else "an unknown archive"
            raise InputError(f"{self._name} is not CIFAR's binary version but {kind}; fetch the binary version")
        self._layout = layout
        self._record = layout.label_bytes + _PIXELS
        batches = {base: size for base, size in sizes.items() if _split_of(base) is not None}
        for base, size in batches.items():
            if size % self._record or not size:
                raise InputError(
                    f"{self._name}: {base} has {size} bytes, no multiple of {self._record}; fetch it again"
                )
        if {_split_of(base) for base in batches} != {TRAIN, TEST}:
            raise InputError(f"{self._name} lacks the training or test batches; fetch it again")
        self._count = sum(batches.values()) // self._record
        self.classes = lists[layout.names]
        self.left_out = LeftOut()

    def __len__(self) -> int:
        return self._count

    def blocks(self) -> Iterator[PixelBlock]:
        """Yields all images in the archive's order."""
        with tar_stream(self._name, self._path) as members:
            for member, reader in members:
                split = _split_of(PurePosixPath(member.name).name)
                while split is not None and (data := reader.read(BLOCK_IMAGES * self._record)):
                    yield self._block(member.name, data, split)

    def _block(self, member: str, data: bytes, split: int) -> PixelBlock:
        rows = np.frombuffer(data, dtype=np.uint8).reshape(-1, self._record)
        labels = rows[:, self._layout.label_bytes - 1].astype(np.int64)
        if labels.max() >= len(self.classes):
            raise InputError(f"{self._name}: {member} has label {labels.max()}, which has no name; fetch it again")
        images = rows[:, self._layout.label_bytes :].reshape(-1, 3, 32, 32)
        return PixelBlock(images=images, labels=labels, splits=np.full(len(rows), split, dtype=np.int8))


def _split_of(base: str) -> int | None:
    if base in ("test_batch.bin", "test.bin"):
        return TEST
    if base == "train.bin" or (base.startswith("data_batch_") and base.endswith(".bin")):
        return TRAIN
    return None
