"""Draws the pictures of an evaluation: confusion matrix, reliability diagram, galleries of images."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from cnn.data.split_reader import SplitReader
from cnn.evaluation.calibration import Reliability
from tasks.evaluation.heat_maps import HeatMap
from tasks.evaluation.report import EvaluationReport, Example
from tasks.reporting.drawing import Section, gallery, images_at, short, without_formulas

COUNTED_CLASSES = 20  # with more classes, numbers in the confusion matrix's cells would be unreadable

LEGEND = "yellow parts spoke most for the model's class, dark violet ones not at all"
OPACITY = 0.5  # of the colours over an image

DARK, BLUE, ORANGE = "#1b2a41", "#2f6db5", "#d9822b"


def confusion_figure(report: EvaluationReport) -> Figure:
    """Draws the confusion matrix: a cell's colour is its share of the true class, its number counts images.

    The colour scale is a square root, so that a confusion of one image in a hundred remains visible.
    """
    counts = np.array(report.confusion)
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    size = len(counts)
    counted = size <= COUNTED_CLASSES
    side = max(5.0, 0.62 * size) if counted else min(24.0, 4.0 + 0.16 * size)
    figure = Figure(figsize=(side + 1.6, side + 0.8), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1))
    names = [short(scores.name) for scores in report.classes]
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
    return without_formulas(figure)


def reliability_figure(report: EvaluationReport) -> Figure:
    """Draws accuracy over confidence, before and after the temperature, and the number of images per bin.

    On the diagonal, confidence equals accuracy; below it, the network is overconfident.
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


def gallery_picture(report: EvaluationReport, split: SplitReader) -> Image.Image:
    """Draws the most confidently wrong and the hardest images of a report, with their predicted and true classes.

    Args:
        split: the split of the report.
    """
    return gallery(
        [
            Section(f"{title} ({report.split} split)", _images(examples, split), _captions(examples, report))
            for title, examples in (
                ("Most confidently wrong", report.confidently_wrong),
                ("Hardest: the two most probable classes are closest", report.hardest),
            )
            if examples
        ]
    )


def heat_map_picture(report: EvaluationReport, maps: Sequence[HeatMap], split: SplitReader) -> Image.Image:
    """Draws images, and below each the parts of it that raised the score of its predicted class, in colours.

    The colours are viridis, whose brightness rises with the value, so the colour-blind can read them.

    Args:
        split: the split of the report.
    """
    sections = []
    for title, wrong in (("Most confidently wrong", True), ("Right", False)):
        chosen = [each for each in maps if (each.example.label != each.example.predicted) == wrong]
        if chosen:
            examples = [each.example for each in chosen]
            images = _images(examples, split)
            overlays = _overlays(images, torch.tensor([each.rows for each in chosen]))
            title = f"{title} ({report.split} split); {LEGEND}"
            sections.append(Section(title, images, _captions(examples, report), overlays))
    return gallery(sections)


def _overlays(images: Tensor, heat: Tensor) -> Tensor:
    """Lays heat n×h×w (0 … 255) over grey versions of uint8 images n×C×H×W; returns uint8 n×3×H×W."""
    smooth = F.interpolate(heat[:, None].float() / 255, images.shape[2:], mode="bilinear")[:, 0]
    colours = torch.from_numpy(colormaps["viridis"](smooth.numpy())[..., :3]).movedim(3, 1)
    grey = images.float().mean(1, keepdim=True)
    return (255 * OPACITY * colours + (1 - OPACITY) * grey).round().to(torch.uint8)


def short_path(path: str, most: int = 22) -> str:
    """Returns a file's path for a caption; of a long one the end, which names the file."""
    return path if len(path) <= most else f"…{path[1 - most :]}"


def _images(examples: Sequence[Example], split: SplitReader) -> Tensor:
    return images_at(split, [each.index for each in examples])


def _captions(examples: Sequence[Example], report: EvaluationReport) -> list[str]:
    names = [short(scores.name) for scores in report.classes]
    return [
        f"model: {names[each.predicted]} ({each.probability:.0%})\n"
        f"label: {names[each.label]} ({each.true_probability:.0%})" + f"\n{short_path(each.path)}" * bool(each.path)
        for each in examples
    ]
