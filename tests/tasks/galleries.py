"""Reads single images back from a drawn gallery."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tasks.reporting.drawing import COLUMNS, GAP, LINE, TILE, TITLE, rgb


def tile(picture: Image.Image, number: int, *, top: int = 0, pair: bool | None = None) -> NDArray[np.uint8]:
    """Returns a tile of the section that begins at `top`.

    Args:
        pair: None if the section has single images; else whether the lower one of each pair is meant.
    """
    row, column = divmod(number, COLUMNS)
    left = column * (TILE + GAP)
    upper = top + TITLE + 2 * LINE + row * height_of(1, pairs=pair is not None)
    upper += TILE + GAP // 2 if pair else 0
    return np.asarray(picture.crop((left, upper, left + TILE, upper + TILE)))


def height_of(images: int, *, pairs: bool = False) -> int:
    """Returns the height of a section's rows, in pixels."""
    return -(-images // COLUMNS) * (2 * LINE + (TILE + GAP) * (1 + pairs))


def as_tile(image: Tensor) -> NDArray[np.uint8]:
    """Returns a uint8 image C×H×H as a gallery shows it, if H divides the tile: each pixel as a square."""
    return rgb(image.numpy()).repeat(TILE // image.shape[-1], 0).repeat(TILE // image.shape[-1], 1)
