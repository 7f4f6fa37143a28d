"""Finds what differs between two versions' answers to the same images: classes, and images newly right or wrong."""

import numpy as np
from numpy.typing import NDArray

from infra.records import Record

Labels = NDArray[np.int64]

EXAMPLES = 10  # images that are newly right, and as many that are newly wrong
OTHER_CLASS = "another class"  # an answer that is not among the classes of the data


class ClassChange(Record):
    """A class of which the two versions have different numbers of images right."""

    name: str
    images: int
    before: int
    now: int


class ChangedImage(Record):
    """An image that only one of the two versions has right."""

    index: int
    """Position in the split."""

    label: str
    before: str
    """The class that the earlier version answers."""

    now: str


class Changes(Record):
    """The differences between an earlier and a new version."""

    classes: tuple[ClassChange, ...]
    """From the largest loss to the largest gain, in shares of the class."""

    newly_right: tuple[ChangedImage, ...]
    """Up to `EXAMPLES`, evenly spaced among all."""

    newly_wrong: tuple[ChangedImage, ...]


def find_changes(
    before: Labels, now: Labels, labels: Labels, classes: tuple[str, ...], compared: NDArray[np.bool_]
) -> Changes:
    """Returns the differences between two versions' answers.

    Args:
        before: int64 [N], positions in `classes` that the earlier version answers; -1 for another class.
        now: likewise, of the new version.
        labels: int64 [N], the right answers.
        compared: mask [N] of the images to compare.
    """
    right_before, right_now = (before == labels) & compared, (now == labels) & compared

    def per_class(mask: NDArray[np.bool_]) -> list[int]:
        counts: list[int] = np.bincount(labels[mask], minlength=len(classes)).tolist()
        return counts

    def examples(mask: NDArray[np.bool_]) -> tuple[ChangedImage, ...]:
        positions = np.flatnonzero(mask)
        chosen = positions[np.linspace(0, len(positions) - 1, min(EXAMPLES, len(positions))).round().astype(int)]
        names = (*classes, OTHER_CLASS)  # -1 is the last
        return tuple(
            ChangedImage(index=index, label=names[labels[index]], before=names[before[index]], now=names[now[index]])
            for index in chosen.tolist()
        )

    counted = zip(classes, per_class(compared), per_class(right_before), per_class(right_now), strict=True)
    changed = [
        ClassChange(name=name, images=images, before=earlier, now=later)
        for name, images, earlier, later in counted
        if earlier != later
    ]
    return Changes(
        classes=tuple(sorted(changed, key=lambda each: (each.now - each.before) / each.images)),
        newly_right=examples(right_now & ~right_before),
        newly_wrong=examples(right_before & ~right_now),
    )
