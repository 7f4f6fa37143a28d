"""Draws grids of images with captions, for figures of reports."""

import io
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure, SubFigure
from numpy.typing import NDArray
from torch import Tensor

from cnn.data.split_reader import SplitReader

COLUMNS = 8  # images per row of a gallery
CELL, SIDE = (1.25, 1.6), 1.15  # inches: a cell with image, caption and margin; the image's side
NAME_LETTERS = 20  # of a class beside an image


def png(figure: Figure) -> bytes:
    """Returns the figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
    return buffer.getvalue()


def section_height(images: int) -> float:
    """Returns the height of a section with this number of images, in inches."""
    return 0.5 + CELL[1] * -(-images // COLUMNS)


def section(part: SubFigure, title: str, images: Tensor, captions: Sequence[str]) -> None:
    """Draws a title, and below it a grid of uint8 images n×C×H×W with a caption each, into a part of a figure."""
    part.suptitle(title)
    axes = part.add_subplot()  # one for all images: matplotlib takes seconds to lay out a pair of axes per image
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, bottom = CELL[0] * (number % COLUMNS), CELL[1] * (number // COLUMNS + 1)
        box = (left, left + SIDE, bottom, bottom - SIDE)
        axes.imshow(rgb(image.numpy()), interpolation="nearest", vmin=0, vmax=255, extent=box)
        axes.text(left + SIDE / 2, bottom - SIDE - 0.03, caption, fontsize=6, ha="center", va="bottom")
    axes.axis("off")
    axes.set(xlim=(0, CELL[0] * COLUMNS), ylim=(CELL[1] * -(-len(images) // COLUMNS), 0))


def rgb(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Converts C×H×W, grey or RGB, to H×W×3."""
    return np.broadcast_to(image.transpose(1, 2, 0), (*image.shape[1:], 3))


def images_at(split: SplitReader, indices: Sequence[int]) -> Tensor:
    """Returns the images at these positions of a split."""
    return split.gather(torch.tensor(indices, dtype=torch.int64))[0]


def short(name: str) -> str:
    """Returns the name, shortened to what fits beside an image."""
    return name if len(name) <= NAME_LETTERS else f"{name[: NAME_LETTERS - 1]}…"
