"""Finds images whose label is probably wrong, by confident learning.

Northcutt, Jiang and Chuang, "Confident Learning: Estimating Uncertainty in Dataset Labels", JAIR 70, 2021, section 3:
the confident joint, its off-diagonal images as candidates, ranked by normalised margin.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK_VALUES = 2**20
"""Probabilities in memory at a time."""

ROUNDING = 1e-6
"""Smaller differences of probabilities do not count. A class of equal images would miss its own mean otherwise."""


@dataclass(frozen=True, kw_only=True)
class LabelErrors:
    """The n images whose label is probably wrong, of N images of K classes; the worst first."""

    index: NDArray[np.int64]
    """[n], positions among the N images."""

    given: NDArray[np.int64]
    """[n], their labels."""

    suggested: NDArray[np.int64]
    """[n], their most probable classes."""

    given_probability: NDArray[np.float64]
    """[n]"""

    suggested_probability: NDArray[np.float64]
    """[n]"""

    thresholds: NDArray[np.float64]
    """[K], the probability from which on an image counts for a class; infinite for classes without an image."""

    joint: NDArray[np.int64]
    """[K, K], the confident joint: images by given label and by the class that they count for."""

    @property
    def score(self) -> NDArray[np.float64]:
        """Returns 1 less the normalised margin of the label, [n]: 0.5 is undecided, 1 is certainly wrong."""
        return (1 + self.suggested_probability - self.given_probability) / 2


def find_label_errors(probabilities: NDArray[np.float32], labels: NDArray[np.int64]) -> LabelErrors:
    """Returns the images that confidently belong to another class than their label says, and most probably so.

    An image counts for the most probable of the classes whose probability is at least the mean that this class has
    among the images that are labelled so. Images whose own label is the most probable class are no candidates, as in
    cleanlab. The probabilities should come from a network that was not trained on these images: one that was may have
    learnt a wrong label by heart. Memory holds `BLOCK_VALUES` probabilities and some bytes per image.

    Args:
        probabilities: [N, K], rows that add up to 1; may be mapped from a file, which is read twice.
        labels: [N], in 0 … K-1.
    """
    classes = probabilities.shape[1]
    sums, counts = np.zeros(classes), np.bincount(labels, minlength=classes)
    for part, own in _blocks(probabilities, labels):
        sums += np.bincount(own, _of(part, own), minlength=classes)
    thresholds = np.where(counts > 0, sums / counts.clip(min=1), np.inf)

    joint = np.zeros((classes, classes), dtype=np.int64)
    found: list[tuple[NDArray[np.int64], ...]] = []
    best: list[tuple[NDArray[np.float64], ...]] = []
    start = 0
    for part, own in _blocks(probabilities, labels):
        confident = np.where(part >= thresholds - ROUNDING, part, -1.0)
        believed = confident.argmax(1)
        counted = _of(confident, believed) >= 0
        np.add.at(joint, (own[counted], believed[counted]), 1)
        suggested = part.argmax(1)
        given_probability, probability = _of(part, own), _of(part, suggested)
        wrong = np.flatnonzero(counted & (believed != own) & (probability > given_probability + ROUNDING))
        found.append((start + wrong, own[wrong], suggested[wrong]))
        best.append((given_probability[wrong], probability[wrong]))
        start += len(own)
    index, given, suggested = (np.concatenate(each) for each in zip(*found, strict=True))
    given_probability, probability = (np.concatenate(each) for each in zip(*best, strict=True))
    order = np.argsort(given_probability - probability, kind="stable")
    return LabelErrors(
        index=index[order],
        given=given[order],
        suggested=suggested[order],
        given_probability=given_probability[order],
        suggested_probability=probability[order],
        thresholds=thresholds,
        joint=joint,
    )


def _blocks(
    probabilities: NDArray[np.float32], labels: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.int64]]]:
    """Yields consecutive rows and their labels."""
    rows = max(1, BLOCK_VALUES // probabilities.shape[1])
    for start in range(0, max(1, len(labels)), rows):
        yield probabilities[start : start + rows].astype(np.float64), labels[start : start + rows]


def _of(values: NDArray[np.float64], columns: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns one value per row: that of its column."""
    return values[np.arange(len(columns)), columns]
