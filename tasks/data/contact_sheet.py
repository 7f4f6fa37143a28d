"""Draws the contact sheet of the data gate: training images of each class, and images that fail a check."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from cnn.data.checks import DataChecks
from cnn.data.split_reader import SplitReader
from cnn.data.splits import Split
from tasks.reporting.drawing import CELL, COLUMNS, images_at, rgb, section, section_height, short, without_formulas

MAX_CLASSES = 40  # rows of a contact sheet; with more classes, evenly spaced ones are shown
IMAGES_PER_CLASS = 12


def contact_sheet(checks: DataChecks, splits: Mapping[Split, SplitReader]) -> Figure:
    """Returns a figure of training images of each class, and below them the images that fail a check.

    Args:
        splits: the splits that were checked.
    """
    train = splits["train"]
    shown = np.unique(np.linspace(0, len(checks.classes) - 1, MAX_CLASSES).round().astype(int)).tolist()
    rows = [images_at(train, _evenly(train.labels == label, IMAGES_PER_CLASS)) for label in shown]
    offenders = [
        (
            f"{kind}: the first images found",
            torch.cat([images_at(splits[each.split], [each.index]) for each in found]),
            [f"{each.split} {each.index}: {short(checks.classes[each.label])}\n{each.note}" for each in found],
        )
        for kind in dict.fromkeys(each.check for each in checks.offenders)
        if (found := [each for each in checks.offenders if each.check == kind])
    ]
    top = 0.5 + 0.5 * len(rows)
    below = [section_height(len(images)) for _, images, _ in offenders]
    figure = Figure(figsize=(COLUMNS * CELL[0], top + sum(below)), layout="constrained")
    parts = figure.subfigures(1 + len(below), 1, height_ratios=(top, *below), squeeze=False)[:, 0]
    axes = parts[0].add_subplot()
    some = f"{len(shown)} of " if len(shown) < len(checks.classes) else ""
    parts[0].suptitle(f"Training images of {some}{len(checks.classes)} classes")
    sheet = _mosaic(rows, IMAGES_PER_CLASS)
    axes.imshow(sheet, aspect="equal", interpolation="nearest")
    side = len(sheet) / len(rows)
    axes.set_yticks(side * (np.arange(len(rows)) + 0.5), [short(checks.classes[label]) for label in shown])
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for part, (title, images, captions) in zip(parts[1:], offenders, strict=True):
        section(part, title, images, captions)
    return without_formulas(figure)


def _mosaic(rows: Sequence[Tensor], columns: int) -> NDArray[np.uint8]:
    """Joins rows of images n×C×H×W to one picture; missing images and a frame around each image are white."""
    _, _, height, width = rows[0].shape
    frame = max(1, height // 24)
    sheet = np.full((len(rows) * (height + frame), columns * (width + frame), 3), 255, dtype=np.uint8)
    for row, images in enumerate(rows):
        for column, image in enumerate(images.numpy()):
            top, left = row * (height + frame), column * (width + frame)
            sheet[top : top + height, left : left + width] = rgb(image)
    return sheet


def _evenly(mask: Tensor, most: int) -> list[int]:
    """Returns up to `most` positions where the mask is true, evenly spaced among all of them."""
    positions = mask.nonzero().squeeze(1)
    chosen = torch.linspace(0, len(positions) - 1, min(most, len(positions))).round().long()
    return positions[chosen].tolist()
