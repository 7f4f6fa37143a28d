"""Draws grids of images with captions, for figures of reports."""

import io
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure, SubFigure
from numpy.typing import NDArray
from torch import Tensor

from cnn.reading import SplitReader

COLUMNS = 8  # images side by side in a gallery
NAME_LETTERS = 20


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
    return buffer.getvalue()


def section_height(images: int) -> float:
    """The height of a section with so many images, in inches."""
    return 0.5 + 1.6 * -(-images // COLUMNS)


def section(part: SubFigure, title: str, images: Tensor, captions: Sequence[str]) -> None:
    """Fill a part of a figure with uint8 images n×C×H×W, side by side, below a title; each has a caption."""
    part.suptitle(title)
    grid = part.subplots(-(-len(images) // COLUMNS), COLUMNS, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, image, caption in zip(grid, images, captions, strict=False):
        axes.imshow(rgb(image.numpy()), interpolation="nearest", vmin=0, vmax=255)
        axes.set_title(caption, fontsize=6)


def rgb(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """C×H×W, grey or RGB, to H×W×3."""
    return np.broadcast_to(image.transpose(1, 2, 0), (*image.shape[1:], 3))


def images_at(split: SplitReader, indices: Sequence[int]) -> Tensor:
    """The images at some places of a split."""
    return split.gather(torch.tensor(indices, dtype=torch.int64))[0]


def short(name: str) -> str:
    """A name, cut to what fits beside an image."""
    return name if len(name) <= NAME_LETTERS else f"{name[: NAME_LETTERS - 1]}…"
