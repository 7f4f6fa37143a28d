"""Runs the first pass over a source: decides each image's split, and the size and channels of all images."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cnn.config.preprocessing import MAX_DEFAULT_SIZE, PreprocessConfig
from cnn.data.splits import SPLITS, TEST, TRAIN, UNDECIDED, VAL, assign, content_keys, group_keys, thin_out
from cnn.errors import InputError
from cnn.formats.block import Block, LabelledImages
from cnn.formats.decode import ImageHeader, Target
from cnn.preprocessing.resume_records import SurveyPart
from cnn.threads import READER_THREADS, in_order

OnImages = Callable[[int], object]
"""Called with the number of images that were processed since the last call."""

OnPart = Callable[[SurveyPart], object]
"""Called with each part of the source that was surveyed."""

DIGEST_BYTES = 32
PART_IMAGES = 8192  # may have to be surveyed again after an interruption


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The decisions of the survey about the N images of a source, in the source's order."""

    target: Target
    labels: NDArray[np.int64]
    splits: NDArray[np.int8]
    """N positions in `SPLITS`; `UNDECIDED` for images left out by the limit."""

    digests: NDArray[np.uint8]
    """N×32: SHA-256 of each image, see `cnn.formats.block.Survey`."""

    headers: Counter[ImageHeader]
    """Headers of the readable images."""

    duplicates: int
    """Number of images equal to an earlier image."""

    shared: int
    """Number of validation and test images that are also in the training split."""

    @property
    def count(self) -> int:
        """Number of images to pack."""
        return int((self.splits != UNDECIDED).sum())

    @property
    def pixel_bytes(self) -> int:
        """Bytes of all images to pack, before encoding."""
        return self.count * int(np.prod(self.target.shape))


def survey(
    source: LabelledImages,
    config: PreprocessConfig,
    on_progress: OnImages = lambda count: None,
    *,
    done: Sequence[SurveyPart] = (),
    on_part: OnPart = lambda part: None,
    max_default_size: int = MAX_DEFAULT_SIZE,
) -> Plan:
    """Reads every image's digest and header; memory holds some 60 bytes per image.

    Args:
        on_progress: called with numbers of images that add up to `len(source)`.
        done: results of an earlier, interrupted survey of the same source, from the first image on without a gap.
        max_default_size: limit of an unset image size in pixels, unless all images are squares of one size.

    Raises:
        InputError: no image can be read, a split would be empty, or a class is missing in the training split.
    """
    parts = list(done)
    start = parts[-1].stop if parts else 0
    on_progress(start)
    for part in _parts(source, config, start, on_progress):
        on_part(part)
        parts.append(part)
    return _plan(source, config, parts, max_default_size)


def retarget(
    plan: Plan,
    source: LabelledImages,
    packed: NDArray[np.int8],
    config: PreprocessConfig,
    *,
    max_default_size: int = MAX_DEFAULT_SIZE,
) -> Plan:
    """Returns the plan with the size and channels of the images that could be decoded.

    A damaged image may have a readable header, which must not decide what becomes of all the others. If the target
    differs from the plan's, the images have to be packed again.

    Args:
        packed: the split of each image after packing, as in `cnn.preprocessing.pack.Packed`.
        max_default_size: as for `survey`.
    """
    failed = (plan.splits != UNDECIDED) & (packed == UNDECIDED)
    if not failed.any() or None not in (config.image_size, config.channels):
        return plan
    headers, start = plan.headers.copy(), 0
    for block in source.blocks():
        wanted = failed[start : start + len(block.labels)]
        start += len(block.labels)
        if wanted.any():
            headers -= block.loaded(wanted).survey(wanted).headers
        if not failed[start:].any():
            break
    return replace(plan, target=_target(headers, config, max_default_size))


def _parts(source: LabelledImages, config: PreprocessConfig, start: int, on_progress: OnImages) -> Iterator[SurveyPart]:
    """Surveys the images from a position on; yields parts of about `PART_IMAGES` images."""

    def survey_block(block: Block) -> SurveyPart:
        found = block.survey()
        keys = content_keys(config.split_seed, found.digests)
        return SurveyPart(
            start=0,
            labels=block.labels,
            splits=block.splits,
            keys=keys,
            digests=np.frombuffer(b"".join(found.digests), dtype=np.uint8).reshape(-1, DIGEST_BYTES),
            headers=found.headers,
        )

    waiting: list[SurveyPart] = []
    with (
        closing(in_order(lambda block: block.loaded(), _blocks_from(source, start), threads=READER_THREADS)) as blocks,
        closing(in_order(survey_block, blocks)) as parts,
    ):
        for part in parts:
            waiting.append(part)
            on_progress(len(part.labels))
            if sum(len(each.labels) for each in waiting) >= PART_IMAGES:
                yield (joined := _join(waiting, start))
                waiting, start = [], joined.stop
    if waiting:
        yield _join(waiting, start)


def _blocks_from(source: LabelledImages, start: int) -> Iterator[Block]:
    """Yields the source's blocks from the block on that begins at this position."""
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
        digests=np.concatenate([part.digests for part in parts]),
        headers=sum((part.headers for part in parts), Counter[ImageHeader]()),
    )


def _plan(source: LabelledImages, config: PreprocessConfig, parts: Sequence[SurveyPart], max_default_size: int) -> Plan:
    if not any(part.headers for part in parts):
        raise InputError(_nothing_readable(source))
    found = _join(parts, 0)
    keys = found.keys if source.groups is None else group_keys(config.split_seed, source.groups, found.keys)
    splits = assign(found.splits, keys, val_fraction=config.val_fraction, test_fraction=config.test_fraction)
    shared = np.isin(found.keys[splits != TRAIN], found.keys[splits == TRAIN]).sum()
    if config.limit is not None:
        splits = thin_out(splits, found.labels, found.keys, config.limit)
    check_splits(count_classes(splits, found.labels, len(source.classes)), source, config)
    return Plan(
        target=_target(found.headers, config, max_default_size),
        labels=found.labels,
        splits=splits,
        digests=found.digests,
        headers=found.headers,
        duplicates=len(found.keys) - len(np.unique(found.keys)),
        shared=int(shared),
    )


def _nothing_readable(source: LabelledImages) -> str:
    block = next(iter(source.blocks())).loaded()
    first = np.arange(len(block.labels)) == 0
    named = "; ".join(f"{each.name}: {each.reason}" for each in block.decode(first, Target(1, 3)).unreadable)
    return f"not one of {len(source)} images can be read ({named}); PNG, JPEG, WebP and BMP are supported"


def count_classes(splits: NDArray[np.int8], labels: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Returns the number of images per split and class, [splits, classes]."""
    return np.stack([np.bincount(labels[splits == split], minlength=classes) for split in range(len(SPLITS))])


def check_splits(counts: NDArray[np.int64], source: LabelledImages, config: PreprocessConfig) -> None:
    """Raises InputError, which says what to do, if a split is empty or a class has no training image.

    Args:
        counts: [splits, classes], as from `count_classes`.
    """
    total, classes = counts.sum(), source.classes
    groups = len(set(source.groups or ()) - {None})
    whole = f" (images of one group stay together; number of groups: {groups:,})" if groups else ""
    for split, setting in ((TRAIN, ""), (VAL, "data.val_fraction"), (TEST, "data.test_fraction")):
        if not counts[split].any():
            remedy = f"add images, or raise {setting}" if setting else "add images"
            raise InputError(
                f"none of {total} images is in the {SPLITS[split]} split{whole}; {remedy}, or change data.split_seed"
            )
    missing = np.flatnonzero(counts[TRAIN] == 0)
    if len(missing):
        names = ", ".join(classes[label] for label in missing[:5]) + (", ..." if len(missing) > 5 else "")
        if config.limit is not None and config.limit < len(classes):
            raise InputError(
                f"data.limit {config.limit} leaves no training image of {names}; set it to at least {len(classes)}"
            )
        raise InputError(f"no training image of class {names}; add images, or remove the class from the other splits")


def _target(headers: Counter[ImageHeader], config: PreprocessConfig, max_default_size: int) -> Target:
    """Returns the configured size and channels; for unset ones the defaults that `PreprocessConfig` describes."""
    size, channels = config.image_size, config.channels
    if size is None:
        sizes = {(header.width, header.height) for header in headers}
        sides = Counter[int]()
        for header, count in headers.items():
            sides[min(header.width, header.height)] += count
        equal_squares = len(sizes) == 1 and all(width == height for width, height in sizes)
        size = min(median(sides), 4096 if equal_squares else max_default_size)
    if channels is None:
        channels = 1 if all(header.grey for header in headers) else 3
    return Target(size, channels, config.resize)


def median(counts: Counter[int]) -> int:
    """Returns the lower median of counted numbers."""
    half, seen = (counts.total() + 1) // 2, 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= half:
            return value
    raise ValueError("the median of nothing")
