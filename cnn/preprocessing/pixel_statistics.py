"""Computes mean and standard deviation of each channel from exact integer sums: the order of images has no effect."""

import numpy as np
from numpy.typing import NDArray

from cnn.data.manifest import Record

Moments = NDArray[np.int64]
"""[n, C, 2]: per image and channel the sum of the values, and of their squares."""


def moments(images: NDArray[np.uint8]) -> Moments:
    """Returns the sums of images [n, C, H, W]."""
    count, channels, height, width = images.shape
    parts = height if height * width > 2**16 else 1
    rows = images.reshape(count, channels, parts, height * width // parts)  # not -1: there may be no image
    # 255 · 255 fits into 16 bits, and a row's sum into 32 bits: four times as fast as 64 bits.
    squares = np.multiply(rows, rows, dtype=np.uint16)
    sums = [values.sum(axis=3, dtype=np.uint32).sum(axis=2, dtype=np.int64) for values in (rows, squares)]
    return np.stack(sums, axis=2)


class PixelSums(Record, extra="forbid"):
    """Sums over a set of images; the sums of two sets can be added."""

    pixels: int = 0
    """Number of pixels of one channel, over all images."""

    sums: tuple[int, ...]
    squares: tuple[int, ...]
    """Per channel, of values 0..255; likewise `sums`."""

    @classmethod
    def of(cls, found: Moments, pixels: int) -> "PixelSums":
        """Adds up the moments of images that have `pixels` pixels each."""
        sums, squares = found.sum(axis=0).T.tolist()
        return cls(pixels=len(found) * pixels, sums=sums, squares=squares)

    def __add__(self, other: "PixelSums") -> "PixelSums":
        return PixelSums(
            pixels=self.pixels + other.pixels,
            sums=tuple(a + b for a, b in zip(self.sums, other.sums, strict=True)),
            squares=tuple(a + b for a, b in zip(self.squares, other.squares, strict=True)),
        )

    def mean(self) -> tuple[float, ...]:
        """Returns the mean per channel, on the scale 0..1."""
        return tuple(total / (255 * self.pixels) for total in self.sums)

    def std(self) -> tuple[float, ...]:
        """Returns the standard deviation per channel, on the scale 0..1; at least one grey level, to divide by it."""
        variances = (
            (squares * self.pixels - total**2) / self.pixels**2
            for total, squares in zip(self.sums, self.squares, strict=True)
        )
        return tuple(max(1.0, float(np.sqrt(variance))) / 255 for variance in variances)
