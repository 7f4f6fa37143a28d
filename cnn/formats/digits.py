"""Reads scikit-learn's `digits.csv`: 1 797 handwritten digits of 8 x 8 pixels.

They are the test part of UCI's "Optical Recognition of Handwritten Digits".
"""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from cnn.data.splits import UNDECIDED
from cnn.errors import InputError
from cnn.formats.block import PixelBlock, UnnamedImages
from cnn.formats.layout import LeftOut

_SIDE, _MAX = 8, 16


class DigitsImages(UnnamedImages):
    """The images of one uncompressed file; a line has 64 values 0..16, scaled here to 0..255, and the label 0..9.

    Raises:
        InputError: the file has other content.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        if len(files) != 1:
            raise InputError(f"digits is one CSV file, found {len(files)} files")
        ((name, path),) = files.items()
        table = _read(name, path)
        grey, labels = table[:, :-1], table[:, -1]
        if table.min() < 0 or grey.max() > _MAX or labels.max() > 9:
            raise InputError(f"{name} has values outside 0..{_MAX}, or labels outside 0..9; fetch it again")
        scaled = (grey * 255 + _MAX // 2) // _MAX  # value · 255 / 16, rounded
        self._images = scaled.astype(np.uint8).reshape(-1, 1, _SIDE, _SIDE)
        self._labels = labels.astype(np.int64)
        self.classes = tuple("0123456789")
        self.left_out = LeftOut()

    def __len__(self) -> int:
        return len(self._labels)

    def blocks(self) -> Iterator[PixelBlock]:
        """Yields all images in the file's order; they have no official split."""
        splits = np.full(len(self), UNDECIDED, dtype=np.int8)
        yield PixelBlock(images=self._images, labels=self._labels, splits=splits)


def _read(name: str, path: Path) -> np.ndarray:
    try:
        with warnings.catch_warnings(action="ignore"):  # loadtxt warns of an empty file, which is refused below
            table = np.loadtxt(path, delimiter=",", dtype=np.int64, ndmin=2)
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{name} is not the digits CSV: {error}") from error
    if table.shape[1] != _SIDE * _SIDE + 1 or not len(table):
        raise InputError(f"{name} is not the digits CSV: expected lines of {_SIDE * _SIDE + 1} numbers")
    return table
