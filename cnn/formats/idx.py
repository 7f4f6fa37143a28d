"""Reads IDX files, the format of MNIST and related data sets (http://yann.lecun.com/exdb/mnist/)."""

import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cnn.data.splits import TEST, TRAIN, Pixels
from cnn.errors import InputError
from cnn.formats.block import PixelBlock, UnnamedImages
from cnn.formats.layout import LeftOut

BLOCK_IMAGES = 2048  # 1.6 MB of 28 x 28

_PIXEL_MAGIC, _LABEL_MAGIC = 0x0803, 0x0801  # unsigned bytes, in three dimensions and in one


class _Part(NamedTuple):
    split: int
    images: Pixels
    labels: NDArray[np.int64]


class IdxImages(UnnamedImages):
    """The images of pairs of files named like `train-images-idx3-ubyte` and `train-labels-idx1-ubyte`, or with `t10k`.

    The files are uncompressed and memory-mapped.

    Args:
        files: path → local file.
        classes: names of the labels 0, 1, ...; None: the labels that occur are used as names.

    Raises:
        InputError: a file is missing, is not IDX, or is too short or too long.
    """

    def __init__(self, files: Mapping[str, Path], classes: Sequence[str] | None = None) -> None:
        parts = []
        for split, words in ((TRAIN, ("train",)), (TEST, ("t10k", "test"))):
            pixels, labels = (_find(files, words, kind) for kind in ("images", "labels"))
            if pixels and labels:
                parts.append(_read_part(split, pixels, files[pixels], labels, files[labels]))
            elif pixels or labels:
                raise InputError(f"{pixels or labels} has no matching {'labels' if pixels else 'images'} file; add it")
        if not parts or parts[0].split != TRAIN:
            raise InputError("no pair of IDX files named like train-images-idx3-ubyte and train-labels-idx1-ubyte")
        if len({part.images.shape[1:] for part in parts}) > 1:
            raise InputError("the training and test images differ in size")
        present = np.unique(np.concatenate([part.labels for part in parts]))
        if classes is None:
            classes = [str(label) for label in present]
            parts = [part._replace(labels=np.searchsorted(present, part.labels)) for part in parts]
        elif present[-1] >= len(classes):
            raise InputError(f"label {present[-1]} has no name: there are {len(classes)} class names")
        self._parts = parts
        self.classes = tuple(classes)
        self.left_out = LeftOut()

    def __len__(self) -> int:
        return sum(len(part.labels) for part in self._parts)

    def blocks(self) -> Iterator[PixelBlock]:
        """Yields the training images, then the test images, in the files' order."""
        for split, images, labels in self._parts:
            for start in range(0, len(labels), BLOCK_IMAGES):
                chosen = slice(start, start + BLOCK_IMAGES)
                splits = np.full(len(labels[chosen]), split, dtype=np.int8)
                yield PixelBlock(images=images[chosen], labels=labels[chosen], splits=splits)


def _find(files: Mapping[str, Path], words: Sequence[str], kind: str) -> str | None:
    names = [path for path in sorted(files) if kind in Path(path).name and any(w in Path(path).name for w in words)]
    if len(names) > 1:
        raise InputError(f"{names[0]} and {names[1]} both look like the {words[0]} {kind}; remove one of them")
    return names[0] if names else None


def _read_part(split: int, pixels: str, pixel_file: Path, labels: str, label_file: Path) -> _Part:
    count, height, width = _header(pixels, pixel_file, _PIXEL_MAGIC)
    (label_count,) = _header(labels, label_file, _LABEL_MAGIC)
    if count != label_count:
        raise InputError(f"{pixels} has {count} images but {labels} {label_count} labels; fetch them again")
    images = np.memmap(pixel_file, dtype=np.uint8, mode="r", offset=16, shape=(count, 1, height, width))
    return _Part(split, images, np.fromfile(label_file, dtype=np.uint8, offset=8).astype(np.int64))


def _header(name: str, file: Path, magic: int) -> tuple[int, ...]:
    """Returns the dimensions, after checking that the file has exactly the size that they imply."""
    length, size = 4 * (1 + magic % 256), file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(length)
    if len(head) < length:
        raise InputError(f"{name} is cut short: an IDX header has {length} bytes, found {size}; fetch it again")
    number, *dimensions = struct.unpack(f">{length // 4}I", head)
    if number != magic:
        raise InputError(f"{name} is not the IDX file expected: it starts with {number:#010x}, not {magic:#010x}")
    expected = length + int(np.prod(dimensions, dtype=object))
    if size != expected:
        fault = "is cut short" if size < expected else "is too long"
        raise InputError(f"{name} {fault}: expected {expected} bytes, found {size}; fetch it again")
    if not all(dimensions):
        raise InputError(f"{name} has no images")
    return tuple(dimensions)
