"""Blocks of a source's images: small enough for memory, and read in two passes.

The first pass surveys each image's digest, size and mode. The second pass decodes the wanted images, after splits and
target size are known. Both passes yield the same blocks in the same order.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cnn.data.manifest import Unreadable
from cnn.data.splits import Pixels
from cnn.formats.decode import ImageHeader, Target, decode_image, fit, read_header, reason_of
from cnn.formats.layout import LeftOut


class Survey(NamedTuple):
    """The result of the first pass for a block of n images."""

    digests: list[bytes]
    """n SHA-256 digests: of the encoded files, or of the pixels if the source contains plain arrays."""

    headers: Counter[ImageHeader]
    """Headers of the readable images."""


class Decoded(NamedTuple):
    """The wanted images of a block: those that could be decoded, and the others."""

    images: Pixels
    positions: NDArray[np.int64]
    """Position of each of `images` in the block."""

    unreadable: tuple[Unreadable, ...]


class Block(Protocol):
    """n images of a source."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """n labels."""

    @property
    def splits(self) -> NDArray[np.int8]:
        """n positions in `cnn.data.splits.SPLITS`, or `UNDECIDED`."""

    def loaded(self, wanted: NDArray[np.bool_] | None = None) -> "Block":
        """Reads the wanted images (None: all) into memory, and returns the block with them."""

    def survey(self, wanted: NDArray[np.bool_] | None = None) -> Survey:
        """Returns digests, sizes and modes of the wanted images (None: of all), without decoding pixels."""

    def decode(self, wanted: NDArray[np.bool_], target: Target) -> Decoded:
        """Decodes the wanted images to the target's size and mode."""


class LabelledImages(Protocol):
    """A labelled collection of images."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a label is a position in this tuple."""

    @property
    def left_out(self) -> LeftOut:
        """The other files of the source, which are left out, for the report."""

    @property
    def groups(self) -> Sequence[str | None] | None:
        """Group of each image, None for one without; None if the source names no groups."""

    def __len__(self) -> int:
        """Returns the number of images in all splits."""

    def names(self) -> Iterator[str | None]:
        """Yields the path of each image in the source; None for images of plain arrays."""

    def blocks(self) -> Iterator[Block]:
        """Yields all images, in the same order on each call."""


class UnnamedImages:
    """Sources of plain arrays, whose images have neither paths nor groups."""

    groups = None

    def __len__(self) -> int:
        raise NotImplementedError

    def names(self) -> Iterator[None]:
        return repeat(None, len(self))


@dataclass(frozen=True, kw_only=True)
class PixelBlock:
    """Images of one size, from a source that contains plain arrays."""

    images: Pixels
    labels: NDArray[np.int64]
    splits: NDArray[np.int8]

    def loaded(self, wanted: NDArray[np.bool_] | None = None) -> Self:
        return self

    def survey(self, wanted: NDArray[np.bool_] | None = None) -> Survey:
        images = self.images if wanted is None else self.images[wanted]
        count, channels, height, width = images.shape
        rows = np.ascontiguousarray(images).reshape(count, -1)
        digests = [hashlib.sha256(row.data).digest() for row in rows]
        header = ImageHeader(width, height, "L" if channels == 1 else "RGB", channels == 1)
        return Survey(digests, Counter({header: count}))

    def decode(self, wanted: NDArray[np.bool_], target: Target) -> Decoded:
        images = self.images[wanted]
        if images.shape[1:] != target.shape:
            images = self._resized(images, target)
        return Decoded(images, np.flatnonzero(wanted), ())

    @staticmethod
    def _resized(images: Pixels, target: Target) -> Pixels:
        """Resizes the images one by one, as image files are: exact integers, equal on every machine."""
        result = np.empty((len(images), *target.shape), dtype=np.uint8)
        for index, image in enumerate(images):
            plane = image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))
            result[index] = fit(Image.fromarray(plane), target)
        return result


@dataclass(frozen=True, kw_only=True)
class FileBlock:
    """Images as encoded files, in memory or still to be read."""

    names: Sequence[str]
    files: Sequence[bytes | Callable[[], bytes]]
    """Contents, or functions that read them; a function's error is no fault of the image, and ends the pass."""

    labels: NDArray[np.int64]
    splits: NDArray[np.int8]

    def loaded(self, wanted: NDArray[np.bool_] | None = None) -> "FileBlock":
        files = list(self.files)
        for position in self._positions(wanted):
            files[position] = _read(files[position])
        return replace(self, files=files)

    def _positions(self, wanted: NDArray[np.bool_] | None) -> Sequence[int]:
        return range(len(self.files)) if wanted is None else np.flatnonzero(wanted).tolist()

    def survey(self, wanted: NDArray[np.bool_] | None = None) -> Survey:
        digests, headers = [], Counter[ImageHeader]()
        for position in self._positions(wanted):
            data = _read(self.files[position])
            digests.append(hashlib.sha256(data).digest())
            try:
                headers[read_header(data)] += 1
            except Exception:
                continue  # the second pass names the image
        return Survey(digests, headers)

    def decode(self, wanted: NDArray[np.bool_], target: Target) -> Decoded:
        images, positions, unreadable = [], [], []
        for position in np.flatnonzero(wanted).tolist():
            data = _read(self.files[position])
            try:
                images.append(decode_image(data, target))
            except Exception as error:  # on damaged bytes Pillow's decoders raise almost anything
                unreadable.append(Unreadable(name=self.names[position], reason=reason_of(error)))
            else:
                positions.append(position)
        stack = np.empty((len(images), *target.shape), dtype=np.uint8)  # np.stack would keep the channels last
        for index, image in enumerate(images):
            stack[index] = image
        return Decoded(stack, np.array(positions, dtype=np.int64), tuple(unreadable))


def _read(file: bytes | Callable[[], bytes]) -> bytes:
    return file if isinstance(file, bytes) else file()
