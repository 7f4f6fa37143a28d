"""The first pass over a source: each image's split, and the size and channels of all."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cnn.config.preprocessing import PreprocessConfig
from cnn.data.splits import SPLITS, TEST, TRAIN, UNDECIDED, VAL, assign, content_keys, thin_out
from cnn.errors import InputError
from cnn.formats.block import Block, LabelledImages
from cnn.formats.decode import Look, Target
from cnn.preprocessing.resume_records import SurveyPart
from cnn.threads import READERS, in_order

OnImages = Callable[[int], object]
"""Called with the number of images just done."""

OnPart = Callable[[SurveyPart], object]
"""Called with each stretch of the source that was surveyed."""

PART = 8192  # images that may have to be surveyed again after an interruption

LARGEST_DEFAULT = 128
"""Pixels; an unset image size is at most this, unless all images are squares of one size."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the survey settles. N: all images, in the source's order."""

    target: Target
    labels: NDArray[np.int64]
    splits: NDArray[np.int8]
    """N positions in `SPLITS`; `UNDECIDED` for images left out by the limit."""

    looks: Counter[Look]
    """Sizes and modes of the readable ones of all N images."""

    duplicates: int
    """Images equal to an earlier one."""

    shared: int
    """Validation and test images that are in the training split too."""

    @property
    def count(self) -> int:
        """Images to pack."""
        return int((self.splits != UNDECIDED).sum())

    @property
    def pixel_bytes(self) -> int:
        """Of all images to pack, before any encoding."""
        return self.count * int(np.prod(self.target.shape))


def survey(
    source: LabelledImages,
    config: PreprocessConfig,
    on_progress: OnImages = lambda count: None,
    *,
    done: Sequence[SurveyPart] = (),
    on_part: OnPart = lambda part: None,
) -> Plan:
    """Read every image's digest and header; holds some 20 bytes for each image.

    Args:
        on_progress: its amounts add up to `len(source)`.
        done: what an earlier, interrupted survey of the same found, from the first image on without a gap.

    Raises:
        InputError: no image can be read, a split would be empty, or a class is missing in the training split.
    """
    parts = list(done)
    start = parts[-1].stop if parts else 0
    on_progress(start)
    for part in _parts(source, config, start, on_progress):
        on_part(part)
        parts.append(part)
    return _plan(source, config, parts)


def _parts(source: LabelledImages, config: PreprocessConfig, start: int, on_progress: OnImages) -> Iterator[SurveyPart]:
    """What is found from a position on, in stretches of about `PART` images."""

    def look_at(block: Block) -> SurveyPart:
        found = block.survey()
        keys = content_keys(config.split_seed, found.digests)
        return SurveyPart(start=0, labels=block.labels, splits=block.splits, keys=keys, looks=found.looks)

    waiting: list[SurveyPart] = []
    with (
        closing(in_order(lambda block: block.loaded(), _blocks_from(source, start), threads=READERS)) as blocks,
        closing(in_order(look_at, blocks)) as parts,
    ):
        for part in parts:
            waiting.append(part)
            on_progress(len(part.labels))
            if sum(len(each.labels) for each in waiting) >= PART:
                yield (joined := _join(waiting, start))
                waiting, start = [], joined.stop
    if waiting:
        yield _join(waiting, start)


def _blocks_from(source: LabelledImages, start: int) -> Iterator[Block]:
    """The source's blocks from one that begins at the position."""
    position = 0
    for block in source.blocks():
        if position >= start:
            yield block
        position += len(block.labels)


def _join(parts: Sequence[SurveyPart], start: int) -> SurveyPart:
    return SurveyPart(
        start=start,
        labels=np.concatenate([part.labels for part in parts]),
        splits=np.concatenate([part.splits for part in parts]),
        keys=np.concatenate([part.keys for part in parts]),
        looks=sum((part.looks for part in parts), Counter[Look]()),
    )


def _plan(source: LabelledImages, config: PreprocessConfig, parts: Sequence[SurveyPart]) -> Plan:
    if not any(part.looks for part in parts):
        raise InputError(_nothing_readable(source))
    found = _join(parts, 0)
    splits = assign(found.splits, found.keys, val_fraction=config.val_fraction, test_fraction=config.test_fraction)
    shared = np.isin(found.keys[splits != TRAIN], found.keys[splits == TRAIN]).sum()
    if config.limit is not None:
        splits = thin_out(splits, found.labels, found.keys, config.limit)
    check_splits(count_classes(splits, found.labels, len(source.classes)), source.classes, config)
    return Plan(
        target=_target(found.looks, config),
        labels=found.labels,
        splits=splits,
        looks=found.looks,
        duplicates=len(found.keys) - len(np.unique(found.keys)),
        shared=int(shared),
    )


def _nothing_readable(source: LabelledImages) -> str:
    block = next(iter(source.blocks())).loaded()
    first = np.arange(len(block.labels)) == 0
    named = "; ".join(f"{each.name}: {each.reason}" for each in block.decode(first, Target(1, 3)).unreadable)
    return f"not one of {len(source)} images can be read ({named}); PNG, JPEG, WebP and BMP are supported"


def count_classes(splits: NDArray[np.int8], labels: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Images of each class in each split, [splits, classes]."""
    return np.stack([np.bincount(labels[splits == split], minlength=classes) for split in range(len(SPLITS))])


def check_splits(counts: NDArray[np.int64], classes: tuple[str, ...], config: PreprocessConfig) -> None:
    """Raise InputError if a split is empty or a class cannot be learnt, saying what to do.

    Args:
        counts: [splits, classes], as from `count_classes`.
    """
    total = counts.sum()
    for split, setting in ((TRAIN, ""), (VAL, "data.val_fraction"), (TEST, "data.test_fraction")):
        if not counts[split].any():
            remedy = f"add images, or raise {setting}" if setting else "add images"
            raise InputError(
                f"none of {total} images is in the {SPLITS[split]} split; {remedy} or change data.split_seed"
            )
    missing = np.flatnonzero(counts[TRAIN] == 0)
    if len(missing):
        names = ", ".join(classes[label] for label in missing[:5]) + (", ..." if len(missing) > 5 else "")
        if config.limit is not None and config.limit < len(classes):
            raise InputError(
                f"data.limit {config.limit} leaves no training image of {names}; the least is {len(classes)}"
            )
        raise InputError(f"no training image of class {names}; add some, or remove the class from the other splits")


def _target(looks: Counter[Look], config: PreprocessConfig) -> Target:
    """The configured size and channels, or those that `PreprocessConfig` promises where they are unset."""
    size, channels = config.image_size, config.channels
    if size is None:
        sizes = {(look.width, look.height) for look in looks}
        sides = Counter[int]()
        for look, count in looks.items():
            sides[min(look.width, look.height)] += count
        own = len(sizes) == 1 and all(width == height for width, height in sizes)
        size = min(median(sides), 4096 if own else LARGEST_DEFAULT)
    if channels is None:
        channels = 1 if all(look.grey for look in looks) else 3
    return Target(size, channels)


def median(counts: Counter[int]) -> int:
    """The lower median of counted numbers."""
    half, seen = (counts.total() + 1) // 2, 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= half:
            return value
    raise ValueError("the median of nothing")
