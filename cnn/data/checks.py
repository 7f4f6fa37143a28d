"""Checks a dataset version before a network learns from it: balance, duplicates, leakage, blank images, drift.

The checks read the packed images, which are what the network would see.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cnn.config.data_checks import DataGateConfig, Level
from cnn.data.manifest import Manifest, Record, Spread
from cnn.data.splits import SPLITS, Split

if TYPE_CHECKING:
    from cnn.data.split_reader import SplitReader

Outcome = Literal["passed", "warned", "failed", "off", "skipped"]

BLOCK_BYTES = 2 * 2**20
"""Pixels that are read at a time. Memory holds these, and some bytes per image."""

CHAMPION_CHECKS = ("missing_classes", "new_classes", "class_drift", "pixel_drift", "trained_on")
"""The checks against the champion's data."""

SLOW_DRIFT_CHECKS = ("slow_class_drift", "slow_pixel_drift")
"""The checks against the oldest champion's data."""

NO_CHAMPION = "there are no data of a champion to compare with"
PIXEL_BINS = 16  # of 16 grey levels each
EXAMPLES_PER_CHECK = 8
SMALLEST_SHARE = 1e-4  # counted for an empty bin in a PSI, which would be infinite otherwise


class DataCheck(Record, extra="forbid"):
    """The result of one check."""

    name: str
    level: Level
    outcome: Outcome
    """`skipped`: there are no data to compare with."""

    value: float | None
    limit: float
    note: str
    """Explains the value to readers of the report."""


class Offender(Record, extra="forbid"):
    """An image that fails a check."""

    check: str
    split: Split
    index: int
    """Position in the split."""

    label: int
    note: str
    path: str = ""
    """The image's file in the source; empty if it is not known."""


class SplitFacts(Record, extra="forbid"):
    """Counts of images of one split."""

    images: int
    class_counts: tuple[int, ...]
    duplicates: int
    """Images equal to an earlier image of the split."""

    leaked: int
    """Images that are also in an earlier split; the order of splits is train, val, test."""

    conflicts: int
    """Images that equal an image with another label, in any split."""

    constant: int
    blank: int


class DataChecks(Record, extra="forbid"):
    """The results of all checks of a dataset version."""

    dataset_version: str
    champion_version: str | None
    classes: tuple[str, ...]
    splits: dict[Split, SplitFacts]
    pixels: tuple[tuple[float, ...], ...]
    """Shares of the training split's pixel values, per channel and bin of 16 grey levels."""

    checks: tuple[DataCheck, ...]
    offenders: tuple[Offender, ...]
    """The first `EXAMPLES_PER_CHECK` of each check."""

    def with_outcome(self, outcome: Outcome) -> tuple[DataCheck, ...]:
        """Returns the checks with this outcome."""
        return tuple(check for check in self.checks if check.outcome == outcome)

    @property
    def outcome(self) -> Literal["passed", "warned", "failed"]:
        """The worst outcome of all checks."""
        return "failed" if self.with_outcome("failed") else "warned" if self.with_outcome("warned") else "passed"


def population_stability_index(expected: ArrayLike, found: ArrayLike) -> float:
    """Returns the PSI of two histograms over the same bins: Σ (f − e) · ln(f / e) over the bins' shares e and f.

    A share below 0.0001 counts as 0.0001. By convention, a PSI below 0.1 is no change, and above 0.25 a major change
    (Siddiqi, Credit Risk Scorecards, 2006).
    """
    e, f = (
        np.maximum(counts / max(counts.sum(), 1), SMALLEST_SHARE)
        for counts in (np.asarray(expected, dtype=np.float64), np.asarray(found, dtype=np.float64))
    )
    return float(((f - e) * np.log(f / e)).sum())


def check_dataset(
    manifest: Manifest,
    splits: Mapping[Split, "SplitReader"],
    config: DataGateConfig,
    champion: "tuple[Manifest, SplitReader] | None" = None,
    on_progress: Callable[[int], object] = lambda count: None,
    *,
    oldest: "tuple[Manifest, SplitReader] | None" = None,
    images_for_margin: int = 0,
    groups: Mapping[Split, Sequence[str | None]] | None = None,
) -> DataChecks:
    """Checks every image of a dataset version once, block by block.

    Args:
        splits: the version's splits.
        champion: manifest and training split of the version that the champion was trained on.
        on_progress: called with numbers of images that add up to those of the splits and of the champion's and the
            oldest champion's training splits; a training split of this same version is not read again.
        oldest: likewise for the oldest champion that a rollback can reach; None if that is the champion.
        images_for_margin: test images that the quality gate needs to show its margin.
        groups: group of each image of the splits, None for one without; None if the data have no groups.
    """
    scans = {name: _scan(splits[name], on_progress) for name in SPLITS}
    failing = _failing_images(scans, config)
    facts = {
        name: SplitFacts(
            images=len(splits[name]),
            class_counts=manifest.splits[name].class_counts,
            duplicates=int(failing["duplicates"][name].sum()),
            leaked=int(failing["leakage"][name].sum()),
            conflicts=int(failing["conflicts"][name].sum()),
            constant=int(failing["constant"][name].sum()),
            blank=int(failing["blank"][name].sum()),
        )
        for name in SPLITS
    }
    pixels = _binned(scans["train"].pixels)
    older: list[_ChampionData | None] = []
    for other in (champion, oldest):
        same = other is not None and other[0].version == manifest.version
        scan = scans["train"] if same or not other else _scan(other[1], on_progress)
        older.append((other[0], _binned(scan.pixels), scan.digests) if other else None)
    learned = _learned_by_champion_only(scans, older[0][2]) if older[0] else None
    checks = (
        *_content_checks(manifest, facts, config),
        *_group_leakage(groups, config),
        *_champion_checks(manifest, pixels, older[0], config),
        _trained_on(learned, config),
        *_drift(manifest, pixels, older[1], config, SLOW_DRIFT_CHECKS),
        _test_images(facts["test"].images, images_for_margin, config),
    )
    off = {check.name for check in checks if check.outcome == "off"}
    return DataChecks(
        dataset_version=manifest.version,
        champion_version=champion[0].version if champion else None,
        classes=manifest.classes,
        splits=facts,
        pixels=tuple(tuple(row) for row in (pixels / pixels.sum(1, keepdims=True)).tolist()),
        checks=checks,
        offenders=tuple(_offenders({kind: masks for kind, masks in failing.items() if kind not in off}, scans)),
    )


@dataclass(frozen=True, kw_only=True)
class _Scan:
    """Statistics of N images with C channels."""

    labels: NDArray[np.int64]
    digests: NDArray[np.uint64]
    """64 bits of each image's BLAKE2b: among a hundred million different images two agree with probability 1:3000."""

    contrast: NDArray[np.uint8]
    """Brightest minus darkest pixel of each image, in the channel where the difference is largest."""

    pixels: NDArray[np.int64]
    """Number of pixels with each value, C×256."""


def _scan(split: "SplitReader", on_progress: Callable[[int], object]) -> _Scan:
    channels = split.shape[0]
    digests, contrast = bytearray(), np.empty(len(split), dtype=np.uint8)
    pixels = np.zeros((channels, 256), dtype=np.int64)
    start = 0
    for images in _image_blocks(split):
        digests += _digests(images)
        planes = images.reshape(len(images), channels, -1)
        contrast[start : start + len(images)] = np.ptp(planes, axis=2).max(1)
        pixels += np.stack([np.bincount(planes[:, channel].ravel(), minlength=256) for channel in range(channels)])
        start += len(images)
        on_progress(len(images))
    return _Scan(
        labels=split.labels.numpy(),
        digests=np.frombuffer(digests, dtype=np.uint64),
        contrast=contrast,
        pixels=pixels,
    )


def pixel_digests(split: "SplitReader") -> NDArray[np.uint64]:
    """Returns 64 bits of the BLAKE2b of each image's pixels, [N]."""
    return np.frombuffer(b"".join(map(_digests, _image_blocks(split))), dtype=np.uint64)


def _image_blocks(split: "SplitReader") -> Iterator[NDArray[np.uint8]]:
    for images, _ in split.blocks(max(1, BLOCK_BYTES // math.prod(split.shape))):
        yield np.ascontiguousarray(images.numpy())


def _digests(images: NDArray[np.uint8]) -> bytes:
    return b"".join(hashlib.blake2b(image.data, digest_size=8).digest() for image in images)


def _learned_by_champion_only(scans: Mapping[Split, _Scan], champion: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Returns a mask of the test images that are in the champion's training split and not in this version's."""
    test = scans["test"].digests
    return np.isin(test, champion) & ~np.isin(test, scans["train"].digests)


def _binned(pixels: NDArray[np.int64]) -> NDArray[np.int64]:
    binned: NDArray[np.int64] = pixels.reshape(len(pixels), PIXEL_BINS, -1).sum(2)
    return binned


def _failing_images(scans: Mapping[Split, _Scan], config: DataGateConfig) -> dict[str, dict[Split, NDArray[np.bool_]]]:
    """Returns boolean masks of the images that fail each check, per split."""
    everything = np.concatenate([scan.digests for scan in scans.values()])
    conflicting = _conflicting(everything, np.concatenate([scan.labels for scan in scans.values()]))
    failing: dict[str, dict[Split, NDArray[np.bool_]]] = {
        kind: {} for kind in ("duplicates", "leakage", "conflicts", "constant", "blank")
    }
    earlier = everything[:0]
    for name, scan in scans.items():
        repeated = np.ones(len(scan.digests), dtype=np.bool_)
        repeated[np.unique(scan.digests, return_index=True)[1]] = False
        failing["duplicates"][name] = repeated
        failing["leakage"][name] = np.isin(scan.digests, earlier)
        failing["conflicts"][name] = np.isin(scan.digests, conflicting)
        failing["constant"][name] = scan.contrast == 0
        failing["blank"][name] = (scan.contrast > 0) & (scan.contrast <= config.blank_contrast)
        earlier = np.concatenate([earlier, scan.digests])
    return failing


def _conflicting(digests: NDArray[np.uint64], labels: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Returns the digests that occur with more than one label."""
    order = np.lexsort((labels, digests))
    digests, labels = digests[order], labels[order]
    return np.unique(digests[1:][(digests[1:] == digests[:-1]) & (labels[1:] != labels[:-1])])


def _offenders(
    failing: Mapping[str, Mapping[Split, NDArray[np.bool_]]], scans: Mapping[Split, _Scan]
) -> Iterator[Offender]:
    for kind, masks in failing.items():
        most = EXAMPLES_PER_CHECK
        places = [(name, int(index)) for name, mask in masks.items() for index in np.flatnonzero(mask)[:most]]
        for name, index in places[:most]:
            note = f"contrast {scans[name].contrast[index]}"
            if kind not in ("constant", "blank"):
                twins = (
                    f"{other} {place}"
                    for other, scan in scans.items()
                    for place in np.flatnonzero(scan.digests == scans[name].digests[index]).tolist()
                    if (other, place) != (name, index)
                )
                note = f"equals {next(twins)}"
            yield Offender(check=kind, split=name, index=index, label=int(scans[name].labels[index]), note=note)


def _at_most(config: DataGateConfig, name: str, value: float | None, note: str) -> DataCheck:
    """Returns the check `name` of a value against `max_<name>`; it is skipped if the value is None."""
    limit = float(getattr(config, f"max_{name}"))
    return _judged(config, name, value, limit, note, good=value is None or value <= limit)


def _judged(
    config: DataGateConfig, name: str, value: float | None, limit: float, note: str, *, good: bool
) -> DataCheck:
    level: Level = getattr(config, name)
    bad: Outcome = "failed" if level == "fail" else "warned"
    judged: Outcome = "skipped" if value is None else "passed" if good else bad
    outcome: Outcome = "off" if level == "off" else judged
    return DataCheck(name=name, level=level, outcome=outcome, value=value, limit=limit, note=note)


def _content_checks(
    manifest: Manifest, facts: Mapping[Split, SplitFacts], config: DataGateConfig
) -> Iterator[DataCheck]:
    """Yields the checks that need no champion."""
    counts = facts["train"].class_counts
    least, most = min(counts), max(counts)
    rarest, commonest = (manifest.classes[counts.index(count)] for count in (least, most))
    note = f"training images of {rarest}, the rarest of {len(counts)} classes"
    limit = config.min_class_images
    yield _judged(config, "class_images", least, limit, note, good=least >= limit)
    note = f"{commonest} has {most:,} training images, {rarest} {least:,}"
    yield _at_most(config, "imbalance", most / max(least, 1), note)

    for name, counted in (("duplicates", "duplicates"), ("leakage", "leaked"), ("constant",) * 2, ("blank",) * 2):
        found = [(split, getattr(fact, counted), fact.images) for split, fact in facts.items()]
        note = ", ".join(f"{split} {count:,} of {images:,}" for split, count, images in found)
        yield _at_most(config, name, max(count / images for _, count, images in found), note)
    total, conflicts = (sum(getattr(fact, key) for fact in facts.values()) for key in ("images", "conflicts"))
    note = f"{conflicts:,} of {total:,} images equal an image with another label"
    yield _at_most(config, "conflicts", conflicts / total, note)

    source = manifest.report
    tried = source.packed + source.unreadable
    note = f"{source.unreadable:,} of {tried:,} could not be decoded"
    if source.unreadable_examples:
        note += f", for example {source.unreadable_examples[0].name} ({source.unreadable_examples[0].reason})"
    yield _at_most(config, "unreadable", source.unreadable / tried, note)
    shares = {name: each.left_out / (each.left_out + each.images) for name, each in source.left_out.items()}
    most_lost = sorted(shares, key=lambda name: -shares[name])[:3]
    losses = (
        f"{name} {source.left_out[name].left_out:,} besides {source.left_out[name].images:,}" for name in most_lost
    )
    note = ", ".join(losses) + " images" if shares else "all files in class folders have names of images"
    yield _at_most(config, "left_out", max(shares.values(), default=0.0), note)
    ratio = max(side.max / max(side.min, 1) for side in (source.width, source.height))
    note = f"width {_spread(source.width)}, height {_spread(source.height)}; all resized to {manifest.image_size}"
    yield _at_most(config, "size_ratio", ratio, note)
    modes = sorted(source.modes.items(), key=lambda item: -item[1])
    note = ", ".join(f"{mode} {count:,}" for mode, count in modes)
    yield _at_most(config, "other_modes", 1 - modes[0][1] / sum(source.modes.values()), note)


def _group_leakage(groups: Mapping[Split, Sequence[str | None]] | None, config: DataGateConfig) -> Iterator[DataCheck]:
    """Yields the check of groups, if the images have some."""
    if groups is None or not any(group is not None for of_split in groups.values() for group in of_split):
        return
    earlier: set[str | None] = set()
    shares, named = [], []
    for split in SPLITS:
        leaked = sum(group is not None and group in earlier for group in groups[split])
        shares.append(leaked / max(len(groups[split]), 1))
        if split != "train":
            named.append(f"{split} {leaked:,} of {len(groups[split]):,}")
        earlier |= set(groups[split])
    crossing = set(groups["train"]) & (set(groups["val"]) | set(groups["test"])) - {None}
    example = f", for example of group {min(map(str, crossing))}" if crossing else ""
    note = f"images of groups of earlier splits: {', '.join(named)}{example}"
    yield _at_most(config, "group_leakage", max(shares), note)


def _spread(spread: Spread) -> str:
    return f"{spread.min} … {spread.max} (median {spread.median})"


_ChampionData = tuple[Manifest, NDArray[np.int64], NDArray[np.uint64]]
"""A manifest, and the training split's binned pixels and image digests."""


def _champion_checks(
    manifest: Manifest, pixels: NDArray[np.int64], champion: _ChampionData | None, config: DataGateConfig
) -> Iterator[DataCheck]:
    """Yields the checks against the champion's training data, except `trained_on`."""
    if champion is None:
        for name in ("missing_classes", "new_classes"):
            yield _at_most(config, name, None, NO_CHAMPION)
    else:
        theirs = champion[0]
        missing = [name for name in theirs.classes if name not in manifest.classes]
        new = [name for name in manifest.classes if name not in theirs.classes]
        yield _at_most(config, "missing_classes", len(missing), _listed(missing))
        yield _at_most(config, "new_classes", len(new), _listed(new))
    yield from _drift(manifest, pixels, champion, config, ("class_drift", "pixel_drift"))


def _drift(
    manifest: Manifest,
    pixels: NDArray[np.int64],
    champion: _ChampionData | None,
    config: DataGateConfig,
    names: tuple[str, str],
) -> Iterator[DataCheck]:
    """Yields the drift of classes and of pixels from a champion's data, as checks with these names."""
    if champion is None:
        for name in names:
            note = NO_CHAMPION if name in CHAMPION_CHECKS else "there is no older champion"
            yield _at_most(config, name, None, note)
        return
    theirs, their_pixels, _ = champion
    before, now = (dict(zip(m.classes, m.splits["train"].class_counts, strict=True)) for m in (theirs, manifest))
    union = [*theirs.classes, *(name for name in manifest.classes if name not in theirs.classes)]
    psi = population_stability_index([before.get(name, 0) for name in union], [now.get(name, 0) for name in union])
    yield _at_most(config, names[0], psi, f"PSI over {len(union)} classes, training splits")
    if len(pixels) != len(their_pixels):
        note = f"{len(pixels)} channels; the champion's data have {len(their_pixels)}"
        yield _at_most(config, names[1], None, note)
        return
    each = [population_stability_index(e, f) for e, f in zip(their_pixels, pixels, strict=True)]
    note = f"PSI over {PIXEL_BINS} bins of grey levels, training splits; per channel "
    yield _at_most(config, names[1], max(each), note + ", ".join(f"{psi:.3f}" for psi in each))


def _trained_on(learned: NDArray[np.bool_] | None, config: DataGateConfig) -> DataCheck:
    if learned is None:
        return _at_most(config, "trained_on", None, NO_CHAMPION)
    note = f"the champion was trained on {int(learned.sum()):,} of {len(learned):,} test images"
    return _at_most(config, "trained_on", float(learned.mean()) if len(learned) else 0.0, note)


def _test_images(images: int, images_for_margin: int, config: DataGateConfig) -> DataCheck:
    limit = max(config.min_test_images, images_for_margin)
    note = f"the smallest loss that these images can rule out is {min(3 / max(images, 1), 1):.2%}"
    if images < images_for_margin:
        note += f"; gate.margin is smaller, so no version can pass against a champion: it needs {limit:,} test images"
    return _judged(config, "test_images", images, limit, note, good=images >= limit)


def _listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "none"
