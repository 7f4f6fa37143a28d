"""What a source gives: blocks of images, small enough to hold in memory, that can be surveyed and decoded.

A source is read twice. The survey takes each image's digest, size and mode; then, once splits and the target
size are known, the wanted images are decoded. Both passes give the same blocks in the same order.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cnn.data.manifest import Unreadable
from cnn.data.splits import Pixels
from cnn.formats.decode import Look, Target, decode_image, fit, look_at, reason_of
from cnn.formats.layout import LeftOut


class Survey(NamedTuple):
    """What the first pass learns from a block of n images."""

    digests: list[bytes]
    """n SHA-256 digests: of the encoded file, or of the pixels where the source holds plain arrays."""

    looks: Counter[Look]
    """Sizes and modes; unreadable images are not in it."""


class Decoded(NamedTuple):
    """The wanted images of a block."""

    images: Pixels
    positions: NDArray[np.int64]
    """Where each of `images` stands in its block."""

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
        """The same with the wanted images in memory, unset: all; whoever waits for a disk or a server does it here."""

    def survey(self) -> Survey:
        """Digests, sizes and modes, without decoding pixels."""

    def decode(self, wanted: NDArray[np.bool_], target: Target) -> Decoded:
        """The wanted images as the target says; unreadable ones are named instead."""


class LabelledImages(Protocol):
    """A labelled collection of images."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a label is a position in this tuple."""

    @property
    def left_out(self) -> LeftOut:
        """Files beside its images, which are left out, for the report."""

    def __len__(self) -> int:
        """Images in all splits."""

    def blocks(self) -> Iterator[Block]:
        """All images, in the same order on each call."""


@dataclass(frozen=True, kw_only=True)
class PixelBlock:
    """Images that the source holds as plain arrays, all of one size."""

    images: Pixels
    labels: NDArray[np.int64]
    splits: NDArray[np.int8]

    def loaded(self, wanted: NDArray[np.bool_] | None = None) -> Self:
        return self

    def survey(self) -> Survey:
        count, channels, height, width = self.images.shape
        rows = np.ascontiguousarray(self.images).reshape(count, -1)
        digests = [hashlib.sha256(row.data).digest() for row in rows]
        look = Look(width, height, "L" if channels == 1 else "RGB", channels == 1)
        return Survey(digests, Counter({look: count}))

    def decode(self, wanted: NDArray[np.bool_], target: Target) -> Decoded:
        images = self.images[wanted]
        if images.shape[1:] != target.shape:
            images = self._fitted(images, target)
        return Decoded(images, np.flatnonzero(wanted), ())

    @staticmethod
    def _fitted(images: Pixels, target: Target) -> Pixels:
        """One by one through the same resize as image files: exact integers, equal on every machine."""
        fitted = np.empty((len(images), *target.shape), dtype=np.uint8)
        for index, image in enumerate(images):
            plane = image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))
            fitted[index] = fit(Image.fromarray(plane), target)
        return fitted


@dataclass(frozen=True, kw_only=True)
class FileBlock:
    """Images as encoded files, in memory or to be read."""

    names: Sequence[str]
    files: Sequence[bytes | Callable[[], bytes]]
    """Contents, or functions that read them; what these raise is no fault of the image, and ends the pass."""

    labels: NDArray[np.int64]
    splits: NDArray[np.int8]

    def loaded(self, wanted: NDArray[np.bool_] | None = None) -> "FileBlock":
        chosen = range(len(self.files)) if wanted is None else np.flatnonzero(wanted).tolist()
        files = list(self.files)
        for position in chosen:
            files[position] = _read(files[position])
        return replace(self, files=files)

    def survey(self) -> Survey:
        digests, looks = [], Counter[Look]()
        for file in self.files:
            data = _read(file)
            digests.append(hashlib.sha256(data).digest())
            try:
                looks[look_at(data)] += 1
            except Exception:
                continue  # it is named in the second pass
        return Survey(digests, looks)

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
