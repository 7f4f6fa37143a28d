"""From a source of labelled images to packed shards and their manifest, in two passes over the source.

`survey` reads digests and headers and settles splits and size; `pack` decodes and writes. Neither
holds more in memory than a few blocks, one shard a split, and some bytes for each image.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cnn.config import PreprocessConfig
from cnn.errors import InputError
from cnn.manifest import DataReport, Manifest, SplitInfo, Spread, Unreadable
from cnn.parallel import in_order
from cnn.shards import SHARD_BYTES, PixelSums, ShardWriter
from cnn.sources import Format, open_source
from cnn.sources.block import Block, Decoded, Source
from cnn.split import SPLITS, TEST, TRAIN, UNDECIDED, VAL
from cnn.survey import OnImages, Plan, check_splits, median, survey

PIECE_BYTES = 4 * 2**20
"""Decoded pixels of one thread's task: with the number of threads it bounds what is in flight."""

EXAMPLES = 20  # unreadable images named in the report


def preprocess(
    format: Format,
    files: Mapping[str, Path],
    config: PreprocessConfig,
    out: Path,
    on_progress: OnImages = lambda count: None,
    *,
    classes: Sequence[str] | None = None,
) -> Manifest:
    """Pack a source into `out/<sha256>.safetensors` shards; equal inputs give equal shards and manifests.

    Args:
        files, classes: see `cnn.sources.open_source`.
        on_progress: called with numbers of images; each counts once when surveyed and once when packed.

    Raises:
        InputError: the source cannot be used.
    """
    source = open_source(format, files, classes)
    plan = survey(source, config, on_progress)
    return pack(source, plan, config, out, on_progress)


def pack(
    source: Source,
    plan: Plan,
    config: PreprocessConfig,
    out: Path,
    on_progress: OnImages = lambda count: None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> Manifest:
    """The second pass: decode the images that the plan keeps, write their shards, sum up the training pixels.

    Args:
        out: an existing folder.
        on_progress: its amounts add up to `plan.count`.

    Raises:
        InputError: too many images are unreadable, or a split or class lost its last image by that.
    """
    writers = [ShardWriter(out, plan.target.shape, shard_bytes=shard_bytes) for _ in SPLITS]
    counts = np.zeros((len(SPLITS), len(source.classes)), dtype=np.int64)
    sums = PixelSums(plan.target.channels)
    bad: list[Unreadable] = []
    bad_count = 0

    def decode(piece: _Piece) -> tuple[_Piece, Decoded]:
        return piece, piece.block.decode(piece.wanted, plan.target)

    for piece, (images, positions, unreadable) in in_order(decode, _pieces(source, plan)):
        labels, splits = piece.block.labels[positions], piece.splits[positions]
        for split, writer in enumerate(writers):
            chosen = splits == split
            writer.add(images[chosen], labels[chosen])
        np.add.at(counts, (splits, labels), 1)
        sums.add(images[splits == TRAIN])
        bad_count += len(unreadable)
        bad += unreadable[: EXAMPLES - len(bad)]
        _check_unreadable(bad_count, bad, plan.count, config)
        on_progress(len(images) + len(unreadable))
    check_splits(counts, source.classes, config)
    return Manifest(
        classes=source.classes,
        channels=plan.target.channels,
        image_size=plan.target.image_size,
        splits={
            split: SplitInfo(count=row.sum(), class_counts=tuple(row.tolist()), shards=writer.close())
            for split, row, writer in zip(SPLITS, counts, writers, strict=True)
        },
        mean=sums.mean(),
        std=sums.std(),
        report=_report(source, plan, counts, bad_count, bad),
    )


def code_files() -> list[Path]:
    """The modules that decide what comes out of preprocessing; a change to any of them may change it."""
    package = Path(__file__).parent
    modules = ("manifest", "preprocess", "shards", "split", "survey")
    return [*sorted((package / "sources").glob("*.py")), *(package / f"{name}.py" for name in modules)]


class _Piece(NamedTuple):
    block: Block
    splits: NDArray[np.int8]
    """Of the whole block's images."""

    wanted: NDArray[np.bool_]
    """Which of the block's images to decode now."""


def _pieces(source: Source, plan: Plan) -> Iterator[_Piece]:
    most = max(1, PIECE_BYTES // int(np.prod(plan.target.shape)))
    offset = 0
    for block in source.blocks():
        splits = plan.splits[offset : offset + len(block.labels)]
        offset += len(splits)
        wanted = np.flatnonzero(splits != UNDECIDED)
        for start in range(0, len(wanted), most):
            mask = np.zeros(len(splits), dtype=np.bool_)
            mask[wanted[start : start + most]] = True
            yield _Piece(block, splits, mask)


def _check_unreadable(count: int, examples: list[Unreadable], total: int, config: PreprocessConfig) -> None:
    if count > config.max_unreadable * total:
        named = "; ".join(f"{image.name} ({image.reason})" for image in examples[:3])
        raise InputError(
            f"{count} or more of {total} images cannot be read, and data.max_unreadable is "
            f"{config.max_unreadable}: {named}{'; ...' if count > 3 else ''}; repair or remove them"
        )


def _report(
    source: Source, plan: Plan, counts: NDArray[np.int64], bad_count: int, bad: Sequence[Unreadable]
) -> DataReport:
    widths, heights, modes = Counter[int](), Counter[int](), Counter[str]()
    for look, count in plan.looks.items():
        widths[look.width] += count
        heights[look.height] += count
        modes[look.mode] += count
    return DataReport(
        images=len(plan.splits),
        packed=int(counts.sum()),
        unreadable=bad_count,
        unreadable_examples=tuple(bad),
        duplicates=plan.duplicates,
        width=_spread(widths),
        height=_spread(heights),
        modes=dict(modes),
        warnings=tuple(_warnings(source, plan, counts, bad_count)),
    )


def _warnings(source: Source, plan: Plan, counts: NDArray[np.int64], bad_count: int) -> Iterator[str]:
    yield from source.remarks
    for split in (VAL, TEST):
        missing = [name for name, count in zip(source.classes, counts[split], strict=True) if not count]
        if missing:
            yield f"the {SPLITS[split]} split has no image of class {', '.join(missing)}"
    if plan.shared:
        yield f"{plan.shared} validation or test images are in the training split too, pixel for pixel"
    if bad_count:
        yield f"{bad_count} images could not be read and were left out"


def _spread(counts: Counter[int]) -> Spread:
    return Spread(min=min(counts), median=median(counts), max=max(counts))
