"""What an evaluation found: numbers by scikit-learn, as JSON, a picture and a table."""

import json
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support
from torch import Tensor
from torch.nn import functional as F

Labels = NDArray[np.int64]

COUNTED_CLASSES = 20  # up to so many, the picture has the number in each cell; more would be unreadable
LISTED_CLASSES = 40  # up to so many, the table lists every class; else the worst ones


class Scores(BaseModel):
    """Precision, recall and their harmonic mean; 0 where nothing was predicted, or nothing is there."""

    model_config = ConfigDict(frozen=True)

    precision: float
    recall: float
    f1: float


class ClassScores(Scores):
    """Scores of one class, one against the rest."""

    name: str

    support: int
    """Images of this class."""


class EvaluationReport(BaseModel):
    """How a network does on a split."""

    model_config = ConfigDict(frozen=True)

    split: str
    images: int

    accuracy: float
    """Share of the images whose most probable class is right."""

    loss: float
    """Mean cross-entropy in nats, without label smoothing or class weights."""

    macro: Scores
    """Unweighted mean over the classes that occur, as label or as prediction."""

    weighted: Scores
    """Mean over the classes, weighted by support."""

    classes: tuple[ClassScores, ...]

    confusion: tuple[tuple[int, ...], ...]
    """Images by [true class][predicted class]."""

    def metrics(self) -> dict[str, float]:
        """The figures that MLflow compares runs by."""
        return {
            f"{self.split}/accuracy": self.accuracy,
            f"{self.split}/loss": self.loss,
            f"{self.split}/macro_f1": self.macro.f1,
        }

    def confusion_json(self) -> str:
        """The confusion matrix alone, with the names of its rows and columns."""
        names = [scores.name for scores in self.classes]
        return json.dumps({"classes": names, "counts": self.confusion})


def evaluation_report(split: str, logits: Tensor, labels: Tensor, classes: Sequence[str]) -> EvaluationReport:
    """Compare predictions with labels.

    Args:
        split: name of the split, for example `test`.
        logits: float32 [N, classes].
        labels: int64 [N].
        classes: names, by label.
    """
    numbers = list(range(len(classes)))
    truth, predicted = labels.numpy(), logits.argmax(1).numpy()
    found = precision_recall_fscore_support(truth, predicted, labels=numbers, zero_division=0.0)
    each = zip(classes, *(figures.tolist() for figures in found), strict=True)
    occurring = np.union1d(truth, predicted)
    return EvaluationReport(
        split=split,
        images=len(labels),
        accuracy=float(accuracy_score(truth, predicted)),
        loss=float(F.cross_entropy(logits.double(), labels)),
        macro=_average("macro", truth, predicted, occurring),
        weighted=_average("weighted", truth, predicted, occurring),
        classes=tuple(
            ClassScores(name=name, precision=precision, recall=recall, f1=f1, support=support)
            for name, precision, recall, f1, support in each
        ),
        confusion=tuple(map(tuple, confusion_matrix(truth, predicted, labels=numbers).tolist())),
    )


def _average(kind: str, truth: Labels, predicted: Labels, labels: Labels) -> Scores:
    precision, recall, f1, _ = precision_recall_fscore_support(
        truth, predicted, labels=labels, average=kind, zero_division=0.0
    )
    return Scores(precision=float(precision), recall=float(recall), f1=float(f1))


def confusion_figure(report: EvaluationReport) -> Figure:
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
    names = [scores.name if len(scores.name) <= 20 else f"{scores.name[:19]}…" for scores in report.classes]
    letters = 9 if counted else 6
    axes.set_xticks(range(size), names, rotation=45 if counted else 90, fontsize=letters)
    if counted:
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
        for (true, predicted), count in np.ndenumerate(counts):
            if count:
                colour = "white" if shares[true, predicted] > 0.3 else "#1b2a41"
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


def report_markdown(report: EvaluationReport) -> str:
    """The report as a page for Prefect: headline, classes, the hardest first, and the commonest mistakes."""
    ordered = sorted(report.classes, key=lambda scores: scores.f1)
    listed = ordered[:LISTED_CLASSES]
    lines = [
        f"**{report.accuracy:.2%}** of {report.images:,} {report.split} images right, "
        f"cross-entropy {report.loss:.4f}, macro F1 {report.macro.f1:.4f}",
        "",
        "| class | precision | recall | F1 | images |",
        "|:--|--:|--:|--:|--:|",
        *(f"| {_cell(s.name)} | {s.precision:.3f} | {s.recall:.3f} | {s.f1:.3f} | {s.support:,} |" for s in listed),
    ]
    if len(listed) < len(ordered):
        lines += ["", f"The {len(listed)} hardest of {len(ordered)} classes."]
    if mistakes := _mistakes(report):
        lines += ["", "| true | taken for | images |", "|:--|:--|--:|", *mistakes]
    return "\n".join(lines)


def _mistakes(report: EvaluationReport, most: int = 8) -> list[str]:
    counts = torch.tensor(report.confusion).fill_diagonal_(0)
    found = counts.flatten().topk(min(most, counts.numel()))
    rows = []
    for count, place in zip(found.values.tolist(), found.indices.tolist(), strict=True):
        true, predicted = (report.classes[number].name for number in divmod(place, len(counts)))
        if count:
            rows.append(f"| {_cell(true)} | {_cell(predicted)} | {count:,} |")
    return rows


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
