"""The pictures of reports, by matplotlib: confusion matrix, reliability, galleries of images."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure, SubFigure
from numpy.typing import NDArray
from torch import Tensor

from cnn.calibration import Reliability
from cnn.reading import SplitReader
from cnn.split import Split

if TYPE_CHECKING:
    from cnn.datachecks import DataChecks
    from tasks.report import EvaluationReport, Example

COUNTED_CLASSES = 20  # up to so many, the confusion matrix has the number in each cell; more would be unreadable
SAMPLED_CLASSES = 40  # rows of a contact sheet; of more classes, evenly spaced ones are shown
SAMPLES = 12  # images of each class
COLUMNS = 8  # images side by side in a gallery
NAME_LETTERS = 20

DARK, BLUE, ORANGE = "#1b2a41", "#2f6db5", "#d9822b"


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
    return buffer.getvalue()


def confusion_figure(report: "EvaluationReport") -> Figure:
    """Draw the confusion matrix: the colour is the share of the true class, the number counts images.

    The colour scale is a square root, so that a confusion of one image in a hundred can still be seen.
    """
    counts = np.array(report.confusion)
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    size = len(counts)
    counted = size <= COUNTED_CLASSES
    side = max(5.0, 0.62 * size) if counted else min(24.0, 4.0 + 0.16 * size)
    figure = Figure(figsize=(side + 1.6, side + 0.8), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1))
    names = [_short(scores.name) for scores in report.classes]
    letters = 9 if counted else 6
    axes.set_xticks(range(size), names, rotation=45 if counted else 90, fontsize=letters)
    if counted:
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
        for (true, predicted), count in np.ndenumerate(counts):
            if count:
                colour = "white" if shares[true, predicted] > 0.3 else DARK
                axes.text(predicted, true, f"{count}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_yticks(range(size), names, fontsize=letters)
    axes.set_xticks(np.arange(size + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(size + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1 if counted else 0.3)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(f"{report.split}: {report.accuracy:.2%} of {report.images:,} images right")
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, ticks=[0, 0.01, 0.05, 0.2, 0.5, 1])
    bar.ax.set_yticklabels(["0", "1 %", "5 %", "20 %", "50 %", "100 %"])
    bar.set_label("share of the true class")
    bar.outline.set_visible(False)
    return figure


def reliability_figure(report: "EvaluationReport") -> Figure:
    """Draw accuracy over confidence, before and after the temperature, and how many images each bin has.

    On the diagonal a network keeps its word; below, it is too sure of itself.
    """
    calibration = report.calibration
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, height_ratios=(3, 1))
    columns = (
        ("as trained", calibration.before, calibration.ece_before),
        (f"temperature {calibration.temperature:.3f}", calibration.after, calibration.ece_after),
    )
    for column, (title, found, ece) in enumerate(columns):
        _reliability(axes[0, column], axes[1, column], found)
        axes[0, column].set_title(f"{report.split}, {title}: ECE {ece:.2%}")
    axes[0, 0].set_ylabel("accuracy")
    axes[1, 0].set_ylabel("images")
    axes[0, 0].legend(loc="upper left", frameon=False)
    return figure


def _reliability(upper: Axes, lower: Axes, found: Reliability) -> None:
    bins = len(found.counts)
    left = np.arange(bins) / bins
    filled = np.array(found.counts) > 0
    accuracy, confidence = np.array(found.accuracy)[filled], np.array(found.confidence)[filled]
    upper.bar(left[filled], accuracy, 1 / bins, align="edge", color=BLUE, edgecolor="white", label="accuracy")
    upper.plot(confidence, confidence, "o", color=ORANGE, markersize=4, label="mean confidence")
    upper.plot([0, 1], [0, 1], "--", color=DARK, linewidth=1)
    upper.set(xlim=(0, 1), ylim=(0, 1))
    lower.bar(left, found.counts, 1 / bins, align="edge", color="#9db4d0", edgecolor="white")
    lower.set_xlabel("confidence: probability of the predicted class")
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)


def gallery_figure(report: "EvaluationReport", split: SplitReader) -> Figure:
    """Show the most confidently wrong and the hardest images of a report, each with what it is and was taken for.

    Args:
        split: the one that the report is about.
    """
    names = [scores.name for scores in report.classes]

    def caption(example: "Example") -> str:
        said = f"said {_short(names[example.predicted])} ({example.probability:.0%})"
        return f"{said}\ntrue {_short(names[example.label])} ({example.true_probability:.0%})"

    sections = [
        (f"{title} ({report.split} split)", _images(split, [e.index for e in examples]), [caption(e) for e in examples])
        for title, examples in (
            ("Most confidently wrong", report.confidently_wrong),
            ("Hardest to decide: the two likeliest classes are closest", report.hardest),
        )
        if examples
    ]
    return _gallery(sections)


def contact_sheet(checks: "DataChecks", splits: Mapping[Split, SplitReader]) -> Figure:
    """Show training images of each class, and below them the images that a check complains of.

    Args:
        splits: those that were checked.
    """
    train = splits["train"]
    shown = np.unique(np.linspace(0, len(checks.classes) - 1, SAMPLED_CLASSES).round().astype(int)).tolist()
    rows = [_images(train, _evenly(train.labels == label, SAMPLES)) for label in shown]
    offenders = [
        (
            f"{kind}: the first of those found",
            torch.cat([_images(splits[each.split], [each.index]) for each in found]),
            [f"{each.split} {each.index}: {_short(checks.classes[each.label])}\n{each.note}" for each in found],
        )
        for kind in dict.fromkeys(each.check for each in checks.offenders)
        if (found := [each for each in checks.offenders if each.check == kind])
    ]
    top = 0.5 + 0.5 * len(rows)
    below = [_section_height(len(images)) for _, images, _ in offenders]
    figure = Figure(figsize=(COLUMNS * 1.25, top + sum(below)), layout="constrained")
    parts = figure.subfigures(1 + len(below), 1, height_ratios=(top, *below), squeeze=False)[:, 0]
    axes = parts[0].add_subplot()
    some = f"{len(shown)} of " if len(shown) < len(checks.classes) else ""
    parts[0].suptitle(f"Training images of {some}{len(checks.classes)} classes")
    sheet = _mosaic(rows, SAMPLES)
    axes.imshow(sheet, aspect="equal", interpolation="nearest")
    side = len(sheet) / len(rows)
    axes.set_yticks(side * (np.arange(len(rows)) + 0.5), [_short(checks.classes[label]) for label in shown])
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for part, (title, images, captions) in zip(parts[1:], offenders, strict=True):
        _section(part, title, images, captions)
    return figure


def _gallery(sections: Sequence[tuple[str, Tensor, Sequence[str]]]) -> Figure:
    """Titled groups of uint8 images n×C×H×W, each with a caption."""
    heights = [_section_height(len(images)) for _, images, _ in sections]
    figure = Figure(figsize=(COLUMNS * 1.25, max(1.0, sum(heights))), layout="constrained")
    if not sections:
        figure.text(0.5, 0.5, "no image to show", ha="center", va="center")
        return figure
    parts = figure.subfigures(len(sections), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (title, images, captions) in zip(parts, sections, strict=True):
        _section(part, title, images, captions)
    return figure


def _section_height(images: int) -> float:
    return 0.5 + 1.6 * -(-images // COLUMNS)  # inches


def _section(part: SubFigure, title: str, images: Tensor, captions: Sequence[str]) -> None:
    part.suptitle(title)
    grid = part.subplots(-(-len(images) // COLUMNS), COLUMNS, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, image, caption in zip(grid, images, captions, strict=False):
        axes.imshow(_rgb(image.numpy()), interpolation="nearest", vmin=0, vmax=255)
        axes.set_title(caption, fontsize=6)


def _mosaic(rows: Sequence[Tensor], columns: int) -> NDArray[np.uint8]:
    """Rows of images n×C×H×W as one picture; what a row lacks stays white, and so does a frame around each image."""
    _, _, height, width = rows[0].shape
    frame = max(1, height // 24)
    sheet = np.full((len(rows) * (height + frame), columns * (width + frame), 3), 255, dtype=np.uint8)
    for row, images in enumerate(rows):
        for column, image in enumerate(images.numpy()):
            top, left = row * (height + frame), column * (width + frame)
            sheet[top : top + height, left : left + width] = _rgb(image)
    return sheet


def _rgb(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """C×H×W, grey or RGB, to H×W×3."""
    return np.broadcast_to(image.transpose(1, 2, 0), (*image.shape[1:], 3))


def _images(split: SplitReader, indices: Sequence[int]) -> Tensor:
    return split.gather(torch.tensor(indices, dtype=torch.int64))[0]


def _evenly(mask: Tensor, most: int) -> list[int]:
    """Places where the mask is true, spread evenly over all such places."""
    places = mask.nonzero().squeeze(1)
    chosen = torch.linspace(0, len(places) - 1, min(most, len(places))).round().long()
    return places[chosen].tolist()


def _short(name: str) -> str:
    return name if len(name) <= NAME_LETTERS else f"{name[: NAME_LETTERS - 1]}…"
