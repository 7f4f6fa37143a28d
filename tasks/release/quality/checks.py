"""The checks of the quality gate: floor, recall of classes, comparison with the champion, drops, and limits."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.config.gates import GateConfig
from tasks.evaluation.binomial import CONFIDENCE, highest_share, normal_score, sign_test, wilson_interval
from tasks.evaluation.paired import lower_bound, p_no_worse, p_worse
from tasks.release.quality.verdict import QualityCheck

Mask = NDArray[np.bool_]
Labels = NDArray[np.int64]

DROP_ALPHA = 0.2
"""Probability of refusing a version for the drop of a class although no class fell by more than the limit. Versions as
good as the champion are hardly ever refused. At 0.05, twice as many real drops of 15 points in classes of 100 images
would pass."""

BETTER = "a more accurate version, for example by longer training, or trained on more images"

NAMED_CLASSES = 5  # in a sentence


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Results of a version on the test split."""

    address: str
    """`name/version`."""

    correct: Mask
    """[N], in the order of the split."""

    predicted: Labels | None = None
    """int64 [N], the answers as positions in the split's classes; -1 for another class. Only the report needs them."""

    unknown: frozenset[int] = frozenset()
    """Classes of the split that the version does not know, as positions; it has all of their images wrong."""

    size_bytes: int | None = None
    """Size of the weights."""

    latency_ms: float | None = None
    """Median time for one image; None if it was not measured."""

    obstacle: str = ""
    """The reason why the version cannot be scored on this split; `correct` is then all false."""

    failed: bool = False
    """Whether the obstacle lies in this process or machine, such as a missing package, not in version or split."""

    @property
    def accuracy(self) -> float:
        """Share of correctly classified images."""
        return float(self.correct.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy (1927)."""
        return wilson_interval(int(self.correct.sum()), len(self.correct))


def images_needed(wins: int, losses: int, images: int, config: GateConfig) -> int:
    """Returns the number of paired images for the configured power, if the versions disagree on the same share of them.

    Connor, Sample size for testing differences in proportions for the paired-sample design, Biometrics 43 (1987).
    If they agree on all images, the share is at most 3 in N, with 95 % confidence (the rule of three).
    """
    effect = _effect(images, config)
    disagree = max((wins + losses or min(3, images)) / images, effect)
    if config.mode == "superior":
        return _connor(disagree, effect, config)
    z_alpha, z_power = normal_score(config.alpha), normal_score(1 - config.power)
    needed = (z_alpha + z_power) ** 2 * disagree / effect**2  # assuming equally good versions
    return math.ceil(max(float(needed), config.smallest_margin(1) / effect))


def _connor(disagree: float, effect: float, config: GateConfig) -> int:
    """Returns the paired images that show a gain of `effect`, if the share that differs is `disagree` ≥ `effect`."""
    z_alpha, z_power = normal_score(config.alpha), normal_score(1 - config.power)
    spread = z_alpha * math.sqrt(disagree) + z_power * math.sqrt(max(disagree - effect**2, 0))
    return math.ceil(float(spread**2 / effect**2))


def _effect(images: int, config: GateConfig) -> float:
    margin = config.margin_on(images)
    return max(margin, config.detectable) if config.mode == "superior" else margin or config.detectable


def wins_and_losses(first: Mask, second: Mask) -> tuple[int, int]:
    """Returns how many images only the first version has right, and how many only the second."""
    return int((first & ~second).sum()), int((second & ~first).sum())


def check_floor(challenger: Scored, labels: Labels, config: GateConfig) -> QualityCheck:
    """Compares the accuracy's lower bound with the floor; without one, McNemar's test against a constant answer."""
    accuracy, images = challenger.accuracy, len(labels)
    if (floor := config.floor) is not None:
        low, _ = challenger.interval
        passed = low >= floor
        measured, bound, limit = _percentages(accuracy, low, floor)
        detail = (
            f"{measured} of {images:,} images right; in general, with {CONFIDENCE:.0%} confidence, at least {bound}; "
            f"{limit} is required"
        )
        if floor == 0:
            detail = "gate.floor=0 accepts any accuracy"
        remedy = f"{BETTER}; a lower gate.floor"
        if not passed and accuracy > floor:
            needed = math.ceil(normal_score((1 - CONFIDENCE) / 2) ** 2 * floor * (1 - floor) / (accuracy - floor) ** 2)
            detail += f"; the test split is too small: {images:,} images, but {needed:,} are needed"
            remedy = f"{BETTER}; {needed:,} test images with the same accuracy; a lower gate.floor"
        return QualityCheck(
            name="floor", value=low, threshold=floor, passed=passed, tested=floor > 0, detail=detail, remedy=remedy
        )
    constant = labels == np.bincount(labels).argmax()
    wins, losses = wins_and_losses(challenger.correct, constant)
    gain = (wins - losses) / images
    p = sign_test(wins, losses)
    passed = p <= config.alpha
    measured, limit = _percentages(accuracy, float(constant.mean()))
    relation = "more" if passed else "not reliably more" if gain > 0 else "not more"
    detail = (
        f"{measured} of {images:,} images are right, {relation} than the {limit} that always answering with the "
        "largest class would get"
    )
    remedy = BETTER
    if not passed and gain > 0:
        needed = _connor((wins + losses) / images, gain, config)
        detail += (
            f"; {_by_chance(p, config)}; the test split is too small: {images:,} images, but {needed:,} are needed"
        )
        remedy = f"{BETTER}; {needed:,} test images with the same accuracy"
    return QualityCheck(
        name="floor", value=accuracy, threshold=float(constant.mean()), passed=passed, detail=detail, remedy=remedy
    )


def check_class_recall(
    challenger: Scored, labels: Labels, classes: tuple[str, ...], config: GateConfig
) -> QualityCheck:
    """Finds classes whose recall is below `min_class_recall` even at its upper confidence bound.

    A class with fewer than `min_support` images fails if it is so clearly below, but never counts as passed.
    """
    limit, name = config.min_class_recall, "class recall"
    if not limit:
        detail = "gate.min_class_recall=0 switches it off"
        return QualityCheck(name=name, threshold=limit, passed=True, tested=False, detail=detail)
    counts = np.bincount(labels, minlength=len(classes))
    right = np.bincount(labels[challenger.correct], minlength=len(classes))
    highest = highest_share(right, counts, 1 - config.alpha)
    # With fewer images than `needed` the bound is never below the limit, even if no image is right.
    needed = max(config.min_support, math.ceil(math.log(config.alpha) / math.log1p(-limit)))
    low = np.flatnonzero(highest < limit)
    tested = np.flatnonzero((counts >= needed) | (highest < limit))
    if not len(tested):
        detail = f"no class has {needed:,} test images"
        return QualityCheck(name=name, threshold=limit, passed=True, tested=False, detail=detail)
    recall = right[tested] / counts[tested]
    worst = tested[recall.argmin()]
    detail = f"the lowest is {classes[worst]}: {right[worst]:,} of {counts[worst]:,} images right"
    remedy = ""
    if len(low):
        worst_first = low[np.argsort(right[low] / counts[low], kind="stable")]
        named = [
            f"{classes[label]}: {right[label]:,} of {counts[label]:,} images right (at most {share})"
            for label in worst_first[:NAMED_CLASSES]
            for share in _percentages(float(highest[label]), limit)[:1]
        ]
        more = f" and {len(low) - NAMED_CLASSES} more" if len(low) > NAMED_CLASSES else ""
        detail = (
            f"{len(low)} of {len(classes)} classes recognised in less than {100 * limit:.4g}% of cases, with "
            f"{1 - config.alpha:.0%} confidence; {', '.join(named)}{more}"
        )
        remedy = "more, or better labelled, training images of these classes; a lower gate.min_class_recall"
    rest = len(classes) - len(tested)
    return QualityCheck(
        name=name,
        value=float(recall.min()),
        threshold=limit,
        passed=not len(low),
        detail=detail,
        untested=f"{rest} of {len(classes)} classes, with fewer than {needed:,} test images" if rest else "",
        remedy=remedy,
    )


def check_comparison(wins: int, losses: int, images: int, p_value: float, config: GateConfig) -> QualityCheck:
    gain, margin = (wins - losses) / images, config.margin_on(images)
    if config.mode == "superior":
        value, threshold = gain, margin
        enough, significant = gain >= margin, p_value <= config.alpha
        passed = enough and significant
        measured, limit = _points(gain, margin)
        detail = f"{_gain(gain, measured)} on {images:,} images"
        if margin:
            detail += f"; at least {limit} points better is required"
        detail += f"; {_by_chance(p_value, config)}" if gain > 0 else "; it must be better, beyond chance"
    else:
        value, threshold = lower_bound(wins, losses, images, config.alpha), 0.0 - margin
        passed = config.can_pass(images) and bool(p_worse(wins, losses, images, margin) <= config.alpha)
        measured, low, limit = _points(gain, value, threshold)
        bound = f"at most {low} points worse" if value < 0 else f"at least {low} points better"
        detail = (
            f"{_gain(gain, measured)} on {images:,} images; in general, with {1 - config.alpha:.0%} confidence, "
            f"{bound}; {'' if passed else 'only '}{limit} points are allowed"
        )
        if not config.can_pass(images):
            detail += f"; {config.why_never(images)}"
    remedy = f"{BETTER}; a {'smaller' if config.mode == 'superior' else 'larger'} gate.margin"
    if not passed and config.can_pass(images) and (small := too_small(wins, losses, images, config)):
        detail += f"; {small}"
        remedy = f"{images_needed(wins, losses, images, config):,} test images; {remedy}"
    return QualityCheck(name=config.mode, value=value, threshold=threshold, passed=passed, detail=detail, remedy=remedy)


def check_known_classes(challenger: Scored, champion: Scored, known: Mask, config: GateConfig) -> QualityCheck:
    """Tests for a loss on the images of the classes that the champion knows: those of new ones would make up for it."""
    wins, losses = wins_and_losses(challenger.correct[known], champion.correct[known])
    images, margin = int(known.sum()), None
    if config.mode == "non-inferior" and config.margin is not None:
        margin = max(config.margin, config.smallest_margin(images))  # they are fewer than the margin was chosen for
    no_worse = config.model_copy(update={"mode": "non-inferior", "margin": margin})
    found = check_comparison(wins, losses, images, sign_test(wins, losses), no_worse)
    detail = f"without the classes that the champion does not know, {found.detail}"
    remedy = found.remedy if config.mode == "non-inferior" else BETTER
    return found.model_copy(update={"name": "known classes", "detail": detail, "remedy": remedy})


def _gain(gain: float, points: str) -> str:
    if not gain:
        return "as good as the champion"
    return f"{points} points {'better' if gain > 0 else 'worse'} than the champion"


def _by_chance(p_value: float, config: GateConfig) -> str:
    """Returns what a p-value means, in words."""
    share = f"{p_value:.2%}" if p_value >= 0.0001 else "less than 0.01%"
    return (
        f"if neither were better, such a result or a better one would come by chance in {share} of cases, and at most "
        f"{config.alpha:.2%} is allowed"
    )


def too_small(wins: int, losses: int, images: int, config: GateConfig) -> str:
    """Returns how many images the split needs, as a sentence; empty if it has them or shows the challenger worse."""
    needed = images_needed(wins, losses, images, config)
    worse = sign_test(losses, wins) <= config.alpha
    if images >= needed or worse:
        return ""
    return (
        f"the test split is too small: {images:,} images, but {needed:,} are needed to find a "
        f"{'gain' if config.mode == 'superior' else 'loss'} of {_effect(images, config):.2%} with probability "
        f"{config.power:.0%}"
    )


def check_drops(
    challenger: Scored, champion: Scored, groups: Mapping[str, Mask], config: GateConfig
) -> tuple[QualityCheck, list[str]]:
    """Tests each class and slice for a drop beyond the limit: Tango's test with Bonferroni's correction. Adds notes."""
    limit = config.max_class_drop
    counted = {name: mask for name, mask in groups.items() if mask.sum() >= config.min_support}
    untested, notes = "", []
    if len(counted) < len(groups):
        rest, fewer = f"{len(groups) - len(counted)} of {len(groups)} classes and slices", config.min_support
        untested = f"{rest}, with fewer than {fewer:,} test images"
        notes.append(f"{rest} have fewer than {fewer:,} images and were not compared on their own")
    if limit >= 1 or not counted:
        detail = f"no class or slice has {config.min_support:,} test images"
        if limit >= 1:
            detail = "gate.max_class_drop=1 allows any"
        return QualityCheck(name="class drop", threshold=limit, passed=True, tested=False, detail=detail), notes
    drops, ps = {}, {}
    for name, mask in counted.items():
        wins, losses = wins_and_losses(challenger.correct[mask], champion.correct[mask])
        images = int(mask.sum())
        drops[name] = (losses - wins) / images
        ps[name] = float(p_no_worse(wins, losses, images, limit))
    alpha = DROP_ALPHA / len(counted)
    most_certain = min(ps, key=ps.__getitem__)
    passed = ps[most_certain] > alpha
    named = max(drops, key=drops.__getitem__) if passed else most_certain
    mask, drop = counted[named], drops[named]
    measured, allowed = _points(drop, limit)
    detail = (
        f"{named}: {champion.correct[mask].mean():.2%} → {challenger.correct[mask].mean():.2%} of {mask.sum():,} images"
    )
    if drop <= limit:
        detail = f"the largest drop is {detail}; at most {allowed} points are allowed"
    else:
        detail += (
            f", a drop of {measured} points, more than the allowed {allowed}, which chance alone "
            f"{'may' if passed else 'hardly'} explain{'' if passed else 's'} "
            f"(p = {ps[named]:.3g}, at most {alpha:.3g} for one of {len(counted)})"
        )
        if passed:
            notes.append(f"the largest observed drop of a class or slice is above the limit: {detail}")
    return QualityCheck(
        name="class drop",
        value=drop,
        threshold=limit,
        passed=passed,
        detail=detail,
        untested=untested,
        remedy=f"more, or better labelled, training images of {named}; a larger gate.max_class_drop",
    ), notes


def _percentages(*shares: float) -> list[str]:
    """Returns shares as percentages, with enough digits that different shares look different."""
    for digits in range(2, 8):
        texts = [f"{share:.{digits}%}" for share in shares]
        if len(set(texts)) == len(set(shares)):
            break
    return texts


def _points(*shares: float) -> list[str]:
    """Returns the sizes of differences in percentage points, with enough digits that they look different."""
    return [text.lstrip("-").removesuffix("%") for text in _percentages(*shares)]


def check_limit(name: str, key: str, value: float | None, limit: float, unit: str) -> QualityCheck:
    passed = value is not None and value <= limit
    detail = "not measured" if value is None else f"{value:,.5g} {unit}, at most {limit:,}"
    remedy = f"a smaller network; a larger gate.{key}"
    return QualityCheck(name=name, value=value, threshold=limit, passed=passed, detail=detail, remedy=remedy)
