"""Draws grids of images with captions: galleries with Pillow, and parts of matplotlib's figures."""

import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cnn.data.split_reader import SplitReader

if TYPE_CHECKING:  # matplotlib takes half a second to load
    from matplotlib.figure import Figure, SubFigure

COLUMNS = 8  # images per row of a gallery
CELL, SIDE = (1.25, 1.6), 1.15  # inches: a cell with image, caption and margin; the image's side
TILE, GAP, LINE, TITLE = 168, 12, 19, 56  # pixels: an image of a gallery, between images, and above them
NAME_LETTERS = 20  # of a class beside an image


def png(figure: "Figure") -> bytes:
    """Returns the figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
    return buffer.getvalue()


def without_formulas(figure: "Figure") -> "Figure":
    """Has texts drawn as they are: names of classes may hold dollars, which matplotlib takes for formulas."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)  # type: ignore[attr-defined]
    return figure


def section_height(images: int) -> float:
    """Returns the height of a section with this number of images, in inches."""
    return 0.5 + CELL[1] * -(-images // COLUMNS)


def section(part: "SubFigure", title: str, images: Tensor, captions: Sequence[str]) -> None:
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


class Section(NamedTuple):
    """A title, and images with captions."""

    title: str
    images: Tensor
    """uint8 n×C×H×H, grey or RGB."""

    captions: Sequence[str]
    """One per image, of one or more lines."""

    below: Tensor | None = None
    """Other images to show below these, of any size."""


def gallery(sections: Sequence[Section]) -> Image.Image:
    """Draws sections below each other; matplotlib would take many times as long."""
    rows = [-(-len(section.images) // COLUMNS) for section in sections]
    captions = [LINE * max([2, *(1 + text.count("\n") for text in each.captions)]) for each in sections]
    heights = [
        above + (TILE + GAP) * (1 if each.below is None else 2) for above, each in zip(captions, sections, strict=True)
    ]
    height = sum(TITLE + count * each for count, each in zip(rows, heights, strict=True))
    sheet = Image.new("RGB", (COLUMNS * (TILE + GAP), height or TITLE), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for section, count, cell, above in zip(sections, rows, heights, captions, strict=True):
        draw.text((sheet.width / 2, top + TITLE / 2), section.title, "black", _font(20), "mm")
        for number, caption in enumerate(section.captions):
            row, column = divmod(number, COLUMNS)
            left, upper = column * (TILE + GAP), top + TITLE + row * cell + above
            draw.multiline_text((left + TILE / 2, upper - 4), caption, "black", _font(13), "md", 2, "center")
            sheet.paste(_tile(section.images[number]), (left, upper))
            if section.below is not None:
                sheet.paste(_tile(section.below[number]), (left, upper + TILE + GAP // 2))
        top += TITLE + count * cell
    if not sections:
        draw.text((sheet.width / 2, TITLE / 2), "no image to show", "black", _font(20), "mm")
    return sheet


def _tile(image: Tensor) -> Image.Image:
    """Returns an image C×H×W in the size of a tile: its pixels as squares, or their means if there are too many."""
    return Image.fromarray(rgb(image.numpy())).resize((TILE, TILE), Image.Resampling.BOX)


@cache
def _font(pixels: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), pixels)


def rgb(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Converts C×H×W, grey or RGB, to H×W×3."""
    return np.broadcast_to(image.transpose(1, 2, 0), (*image.shape[1:], 3))


def images_at(split: SplitReader, indices: Sequence[int]) -> Tensor:
    """Returns the images at these positions of a split."""
    return split.gather(torch.tensor(indices, dtype=torch.int64))[0]


def short(name: str) -> str:
    """Returns the name, shortened to what fits beside an image."""
    return name if len(name) <= NAME_LETTERS else f"{name[: NAME_LETTERS - 1]}…"
