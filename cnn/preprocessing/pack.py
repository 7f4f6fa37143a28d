"""Turns a source of labelled images into packed shards and their manifest, in two passes over the source.

`survey` reads digests and headers, and decides splits and size; `pack` decodes images and writes shards. Both hold in
memory only a few blocks, one shard per split, and some bytes per image.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cnn.config.preprocessing import PreprocessConfig
from cnn.data.encoding import check_encoding, decode, encode
from cnn.data.manifest import Losses, Manifest, SourceReport, SplitInfo, Spread, Unreadable
from cnn.data.shard_writer import SHARD_BYTES, Images, ShardWriter
from cnn.data.splits import SPLITS, TEST, TRAIN, UNDECIDED, VAL
from cnn.errors import InputError
from cnn.formats import Format, open_source
from cnn.formats.block import Block, LabelledImages
from cnn.preprocessing.pixel_statistics import Moments, moments
from cnn.preprocessing.resume_records import PackedShard
from cnn.preprocessing.split_packer import MAX_EXAMPLES, Failure, OnShard, SplitPacker
from cnn.preprocessing.survey import OnImages, Plan, check_splits, count_classes, median, retarget, survey
from cnn.threads import READER_THREADS, in_order

PIECE_BYTES = 4 * 2**20
"""Decoded pixels of one thread's task; with the number of threads it limits the memory in use."""

LARGE_SET_BYTES = 64 * 2**30  # of pixels; above it shards are small, since readers that stream mix whole shards
SMALL_SHARD_BYTES = 8 * 2**20


class Packed(NamedTuple):
    """A dataset version, and which images of the source it holds."""

    manifest: Manifest
    splits: NDArray[np.int8]
    """The split of each image of the source; `UNDECIDED` for those left out."""


def preprocess(
    format: Format,
    files: Mapping[str, Path],
    config: PreprocessConfig,
    out: Path,
    on_progress: OnImages = lambda count: None,
    *,
    classes: Sequence[str] | None = None,
) -> Manifest:
    """Packs a source into `out/<sha256>.safetensors` shards; equal inputs give equal shards and manifests.

    Args:
        files, classes: see `cnn.formats.open_source`.
        on_progress: called with numbers of images; each image counts once when surveyed and once when packed.

    Raises:
        InputError: the source cannot be used.
    """
    source = open_source(format, files, classes)
    plan = survey(source, config, on_progress)
    packed = pack(source, plan, config, out, on_progress)
    again = retarget(plan, source, packed.splits, config)
    return (packed if again.target == plan.target else pack(source, again, config, out)).manifest


def pack(
    source: LabelledImages,
    plan: Plan,
    config: PreprocessConfig,
    out: Path,
    on_progress: OnImages = lambda count: None,
    *,
    done: Sequence[PackedShard] = (),
    on_shard: OnShard = lambda packed, path: None,
) -> Packed:
    """Runs the second pass: decodes the images of the plan, writes their shards, and sums up the training pixels.

    Args:
        out: an existing folder.
        on_progress: called with numbers of images that add up to `plan.count`.
        done: shards that an earlier, interrupted call with the same source and plan has finished: per split, from the
            first shard on without a gap. Their images are not read again, and the result is the same.

    Raises:
        InputError: too many images are unreadable, or a split or class has no readable image.
    """
    check_encoding(config.encoding, plan.target.channels)
    packers = [
        SplitPacker(
            split,
            ShardWriter(out, plan.target.shape, encoding=config.encoding, shard_bytes=shard_bytes(plan, config)),
            out,
            plan.target.shape,
            [packed for packed in done if packed.split == split],
            on_shard,
        )
        for split in SPLITS
    ]
    starts = np.array([packer.stop for packer in packers])
    todo = sum(int((plan.splits[start:] == split).sum()) for split, start in enumerate(starts))
    on_progress(plan.count - todo)

    def prepare(piece: _Piece) -> tuple[_Piece, _Prepared]:
        return piece, _prepare(piece, plan, config)

    with (
        closing(in_order(_Piece.loaded, _pieces(source, plan, starts), threads=READER_THREADS)) as loaded,
        closing(in_order(prepare, loaded)) as prepared,
    ):
        for piece, ready in prepared:
            for split, packer in enumerate(packers):
                _add_to_split(piece, ready, split, packer)
            _check_unreadable(packers, plan.count, config)
            on_progress(len(ready.images) + len(ready.unreadable))
    shards = [packer.close() for packer in packers]
    failures = sorted((failure for packer in packers for failure in packer.failures), key=lambda each: each.position)
    packed = plan.splits.copy()
    packed[[failure.position for failure in failures]] = UNDECIDED
    counts = count_classes(packed, plan.labels, len(source.classes))
    check_splits(counts, source, config)
    sums = packers[TRAIN].sums
    manifest = Manifest(
        classes=source.classes,
        channels=plan.target.channels,
        image_size=plan.target.image_size,
        resize=plan.target.resize,
        splits={
            split: SplitInfo(count=row.sum(), class_counts=tuple(row.tolist()), shards=its)
            for split, row, its in zip(SPLITS, counts, shards, strict=True)
        },
        mean=sums.mean(),
        std=sums.std(),
        encoding=config.encoding,
        report=_report(source, plan, counts, failures),
    )
    return Packed(manifest, packed)


def shard_bytes(plan: Plan, config: PreprocessConfig) -> int:
    """Returns the size of a full shard, in bytes."""
    if config.shard_bytes is not None:
        return config.shard_bytes
    return SHARD_BYTES if plan.pixel_bytes <= LARGE_SET_BYTES else SMALL_SHARD_BYTES


def code_files() -> list[Path]:
    """Returns the modules on which the result of preprocessing depends."""
    package = Path(__file__).parents[1]
    whole = (path for name in ("formats", "preprocessing") for path in sorted((package / name).glob("*.py")))
    return [*whole, *(package / "data" / f"{name}.py" for name in ("encoding", "manifest", "shard_writer", "splits"))]


class _Piece(NamedTuple):
    block: Block
    start: int
    """Position of the block's first image in the source."""

    splits: NDArray[np.int8]
    """Splits of all images of the block."""

    wanted: NDArray[np.bool_]
    """Mask of the block's images to decode now."""

    def loaded(self) -> "_Piece":
        return self._replace(block=self.block.loaded(self.wanted))


class _Prepared(NamedTuple):
    """The wanted images of a piece: those that could be read, and the others."""

    images: Images
    positions: NDArray[np.int64]
    """Positions of `images` in the block."""

    moments: Moments
    unreadable: tuple[Unreadable, ...]
    failed: NDArray[np.int64]
    """Positions of `unreadable` in the block."""


def _pieces(source: LabelledImages, plan: Plan, starts: NDArray[np.int64]) -> Iterator[_Piece]:
    """Yields the images to pack: of each split, those from a position in `starts` on."""
    most = max(1, PIECE_BYTES // int(np.prod(plan.target.shape)))
    offset = 0
    for block in source.blocks():
        positions = np.arange(offset, offset + len(block.labels))
        splits = plan.splits[positions]
        wanted = np.flatnonzero((splits != UNDECIDED) & (positions >= starts[splits]))
        for start in range(0, len(wanted), most):
            mask = np.zeros(len(splits), dtype=np.bool_)
            mask[wanted[start : start + most]] = True
            yield _Piece(block, offset, splits, mask)
        offset += len(positions)


def _prepare(piece: _Piece, plan: Plan, config: PreprocessConfig) -> _Prepared:
    pixels, positions, unreadable = piece.block.decode(piece.wanted, plan.target)
    images: Images = pixels
    if config.encoding != "raw":
        images = encode(pixels, config.encoding, config.quality)
        pixels = np.stack([decode(file) for file in images]) if images else pixels  # as a reader will see them
    failed = np.setdiff1d(np.flatnonzero(piece.wanted), positions)
    return _Prepared(images, positions, moments(pixels), unreadable, failed)


def _add_to_split(piece: _Piece, ready: _Prepared, split: int, packer: SplitPacker) -> None:
    """Adds a piece's images of one split to its packer."""
    failed = piece.splits[ready.failed] == split
    lost = [image for image, in_split in zip(ready.unreadable, failed, strict=True) if in_split]
    packer.skip((piece.start + ready.failed[failed]).tolist(), lost)
    index = np.flatnonzero(piece.splits[ready.positions] == split)
    positions = ready.positions[index]
    images = ready.images[index] if isinstance(ready.images, np.ndarray) else [ready.images[i] for i in index.tolist()]
    packer.add(images, piece.block.labels[positions], piece.start + positions, ready.moments[index])


def _check_unreadable(packers: Sequence[SplitPacker], total: int, config: PreprocessConfig) -> None:
    count = sum(len(packer.failures) for packer in packers)
    if count > config.max_unreadable * total:
        failures = sorted((f for packer in packers for f in packer.failures), key=lambda each: each.position)
        named = "; ".join(f"{image.name} ({image.reason})" for image in _examples(failures)[:3])
        raise InputError(
            f"{count} or more of {total} images cannot be read, and data.max_unreadable is "
            f"{config.max_unreadable}: {named}{'; ...' if count > 3 else ''}; repair or remove them"
        )


def _examples(failures: Sequence[Failure]) -> tuple[Unreadable, ...]:
    """Returns the first unreadable images; each split has named as many, so none is missing."""
    return tuple(failure.image for failure in failures[:MAX_EXAMPLES] if failure.image)


def _report(source: LabelledImages, plan: Plan, counts: NDArray[np.int64], failures: Sequence[Failure]) -> SourceReport:
    widths, heights, modes = Counter[int](), Counter[int](), Counter[str]()
    for header, count in plan.headers.items():
        widths[header.width] += count
        heights[header.height] += count
        modes[header.mode] += count
    return SourceReport(
        images=len(plan.splits),
        packed=int(counts.sum()),
        unreadable=len(failures),
        unreadable_examples=_examples(failures),
        duplicates=plan.duplicates,
        width=_spread(widths),
        height=_spread(heights),
        modes=dict(modes),
        left_out=_losses(source, plan),
        warnings=tuple(_warnings(source, plan, counts, len(failures))),
    )


def _losses(source: LabelledImages, plan: Plan) -> dict[str, Losses]:
    images = np.bincount(plan.labels, minlength=len(source.classes)).tolist()
    counts = dict(zip(source.classes, images, strict=True))
    return {name: Losses(images=counts.get(name, 0), left_out=lost) for name, lost in source.left_out.classes.items()}


def _warnings(source: LabelledImages, plan: Plan, counts: NDArray[np.int64], bad_count: int) -> Iterator[str]:
    # Their words are part of the manifest: others would give other dataset versions.
    yield from source.left_out.remarks
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
