"""Whether a version may replace the champion: both on the same images, paired, each check with its numbers."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from scipy.stats import binomtest, norm

from tasks.gateconfig import GateConfig
from tasks.markdown import plain

Mask = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What a version made of the test split."""

    address: str
    """`name/version`."""

    correct: Mask
    """[N], in the order of the split."""

    size_bytes: int | None = None
    """Of the weights."""

    latency_ms: float | None = None
    """Median time for one image; None if it was not measured."""

    obstacle: str = ""
    """Why it cannot be scored on this split at all; `correct` is then all false."""

    @property
    def accuracy(self) -> float:
        """Share of the images."""
        return float(self.correct.mean())


class Check(BaseModel):
    """One condition. `value` is None where there is nothing to measure."""

    model_config = ConfigDict(frozen=True)

    name: str
    value: float | None
    threshold: float
    passed: bool
    detail: str
    """What was compared, in a sentence."""


class Verdict(BaseModel):
    """The quality gate's decision, and what it rests on."""

    model_config = ConfigDict(frozen=True)

    challenger: str
    champion: str | None
    """`name/version`; None if there was none."""

    passed: bool
    images: int
    """Of the test split."""

    accuracy: float
    interval: tuple[float, float]
    """Of the accuracy: 95 %, Wilson (1927)."""

    champion_accuracy: float | None
    """On the same images; None without a champion, or if it cannot take them."""

    only_challenger: int
    """Images that only the challenger has right."""

    only_champion: int
    p_value: float | None
    """McNemar's exact test (1947), one-sided: how probable so many wins are if both are equally good."""

    checks: tuple[Check, ...]
    notes: tuple[str, ...]
    """What limits the verdict."""

    dataset_version: str = ""
    """Whose test split it was."""

    config: GateConfig

    @property
    def sha256(self) -> str:
        """Digest of its JSON."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """As JSON."""
        return self.model_dump_json(indent=2).encode()

    @property
    def summary(self) -> str:
        """One line: the decision, and what decided it."""
        head = f"{self.challenger} {self.accuracy:.2%}"
        against = f" against {self.champion}" if self.champion else ", no champion"
        if self.champion_accuracy is not None:
            against += f" {self.champion_accuracy:.2%}"
        failed = "; ".join(f"{check.name}: {check.detail}" for check in self.checks if not check.passed)
        return f"{'passed' if self.passed else 'refused'}: {head}{against}" + (f"; {failed}" if failed else "")

    def markdown(self) -> str:
        """As a page, for MLflow and Prefect."""
        low, high = self.interval
        lines = [
            f"**{'Passed' if self.passed else 'Refused'}**: {plain(self.challenger)} against "
            + plain(self.champion or "no champion"),
            "",
            "| | accuracy | only this one right |",
            "|:--|--:|--:|",
            f"| {plain(self.challenger)} | {self.accuracy:.2%} ({low:.2%} to {high:.2%}) | {self.only_challenger:,} |",
        ]
        if self.champion and self.champion_accuracy is not None:
            lines.append(f"| {plain(self.champion)} | {self.champion_accuracy:.2%} | {self.only_champion:,} |")
        basis = f"{self.images:,} test images"
        if self.dataset_version:
            basis += f", dataset version `{self.dataset_version[:12]}`"
        if self.p_value is not None:
            basis += f", McNemar exact p = {self.p_value:.3g} (one-sided)"
        lines += ["", basis]
        lines += ["", "| check | value | threshold | | |", "|:--|--:|--:|:--|:--|"]
        for check in self.checks:
            value = "" if check.value is None else f"{check.value:.5g}"
            said = "passed" if check.passed else "**failed**"
            lines.append(f"| {check.name} | {value} | {check.threshold:.5g} | {said} | {plain(check.detail)} |")
        return "\n".join([*lines, "", *(f"- {plain(note)}" for note in self.notes)]).rstrip() + "\n"


def judge(
    challenger: Scored,
    champion: Scored | None,
    config: GateConfig,
    *,
    labels: NDArray[np.int64],
    classes: tuple[str, ...],
    slices: Mapping[str, Mask] | None = None,
    dataset_version: str = "",
) -> Verdict:
    """Decide whether the challenger may replace the champion. Without one, floor and limits alone decide.

    Superior: the observed gain reaches the margin, and McNemar's exact test, one-sided, is significant at `alpha`.
    Non-inferior: the lower 1 − alpha confidence bound of the difference (Clopper and Pearson (1934) on the images that
    only one of the two has right, their number taken as given) is not below −margin.

    Args:
        labels: int64 [N], of the same images in the same order.
        classes: names, by label.
        slices: further groups of images, each a mask [N], that may not get worse either; by name.
    """
    images = len(labels)
    checks = [_floor(challenger, labels, config)]
    notes: list[str] = []
    wins = losses = 0
    p_value = None
    if champion and champion.obstacle:
        checks.append(Check(name=config.mode, value=None, threshold=0, passed=False, detail=champion.obstacle))
    elif champion:
        wins = int((challenger.correct & ~champion.correct).sum())
        losses = int((champion.correct & ~challenger.correct).sum())
        p_value = float(binomtest(wins, wins + losses, alternative="greater").pvalue) if wins + losses else 1.0
        checks.append(_comparison(wins, losses, images, p_value, config))
        groups = {f"class {name}": labels == label for label, name in enumerate(classes)} | dict(slices or {})
        drop, uncounted = _largest_drop(challenger, champion, groups, config)
        checks.append(drop)
        if uncounted:
            notes.append(
                f"{uncounted} of {len(groups)} classes and slices have fewer than {config.min_support} images "
                "and were not compared on their own"
            )
        needed = images_needed(wins, losses, images, config)
        worse = bool(losses) and binomtest(wins, wins + losses, alternative="less").pvalue <= config.alpha
        if images < needed and not worse:
            notes.append(
                f"the test split is too small: {images:,} images, but {needed:,} are needed to find a "
                f"{'gain' if config.mode == 'superior' else 'loss'} of {_effect(config):.2%} with probability "
                f"{config.power:.0%}; a refusal may be for want of images"
            )
    if config.max_size_bytes is not None:
        checks.append(_limit("size", challenger.size_bytes, config.max_size_bytes, "bytes of weights"))
    if config.max_latency_ms is not None:
        checks.append(_limit("latency", challenger.latency_ms, config.max_latency_ms, "ms for one image, median"))
    interval = binomtest(int(challenger.correct.sum()), images).proportion_ci(0.95, method="wilson")
    return Verdict(
        challenger=challenger.address,
        champion=champion.address if champion else None,
        passed=all(check.passed for check in checks),
        images=images,
        accuracy=challenger.accuracy,
        interval=(float(interval.low), float(interval.high)),
        champion_accuracy=champion.accuracy if champion and not champion.obstacle else None,
        only_challenger=wins,
        only_champion=losses,
        p_value=p_value,
        checks=tuple(checks),
        notes=tuple(notes),
        dataset_version=dataset_version,
        config=config,
    )


def images_needed(wins: int, losses: int, images: int, config: GateConfig) -> int:
    """Paired images for the wanted power, when the two disagree on as large a share of images as here.

    Connor, Sample size for testing differences in proportions for the paired-sample design, Biometrics 43 (1987).
    Where they agree on all, the share is at most 3 in N, with 95 % confidence (the rule of three).
    """
    effect = _effect(config)
    disagree = max((wins + losses or min(3, images)) / images, effect)
    z_alpha, z_power = norm.isf(config.alpha), norm.ppf(config.power)
    if config.mode == "superior":
        needed = (z_alpha * math.sqrt(disagree) + z_power * math.sqrt(disagree - effect**2)) ** 2 / effect**2
    else:  # both are taken to be equally good
        needed = (z_alpha + z_power) ** 2 * disagree / effect**2
    return math.ceil(float(needed))


def _effect(config: GateConfig) -> float:
    margin = config.effective_margin
    return max(margin, config.detectable) if config.mode == "superior" else margin or config.detectable


def _floor(challenger: Scored, labels: NDArray[np.int64], config: GateConfig) -> Check:
    accuracy = challenger.accuracy
    if config.floor is not None:
        passed, detail = accuracy >= config.floor, f"accuracy {accuracy:.2%}, at least {config.floor:.2%}"
        return Check(name="floor", value=accuracy, threshold=config.floor, passed=passed, detail=detail)
    constant = float(np.bincount(labels).max() / len(labels))
    detail = f"accuracy {accuracy:.2%}, above {constant:.2%}, the share of the largest class"
    return Check(name="floor", value=accuracy, threshold=constant, passed=accuracy > constant, detail=detail)


def _comparison(wins: int, losses: int, images: int, p_value: float, config: GateConfig) -> Check:
    gain, margin = (wins - losses) / images, config.effective_margin
    if config.mode == "superior":
        return Check(
            name="superior",
            value=gain,
            threshold=margin,
            passed=gain > 0 and gain >= margin and p_value <= config.alpha,
            detail=f"gain {gain:+.2%}, at least {margin:.2%}; p = {p_value:.3g}, at most {config.alpha:g}",
        )
    bound = _lower_bound(wins, losses, images, config.alpha)
    return Check(
        name="non-inferior",
        value=bound,
        threshold=-margin,
        passed=bound >= -margin,
        detail=f"gain {gain:+.2%}, with {1 - config.alpha:.0%} confidence above {bound:+.2%}; at least {-margin:.2%}",
    )


def _lower_bound(wins: int, losses: int, images: int, alpha: float) -> float:
    disagree = wins + losses
    if not disagree:
        return 0.0
    share = binomtest(wins, disagree, alternative="greater").proportion_ci(1 - alpha, method="exact").low
    return float(disagree / images * (2 * share - 1))


def _largest_drop(
    challenger: Scored, champion: Scored, groups: Mapping[str, Mask], config: GateConfig
) -> tuple[Check, int]:
    """The check, and how many groups were too small to count."""
    counted = {name: mask for name, mask in groups.items() if mask.sum() >= config.min_support}
    drops = {
        name: float(champion.correct[mask].mean() - challenger.correct[mask].mean()) for name, mask in counted.items()
    }
    worst = max(drops, key=drops.__getitem__, default=None)
    limit = config.max_class_drop
    if worst is None:
        detail = f"no class or slice has {config.min_support} images"
        return Check(name="class drop", value=None, threshold=limit, passed=True, detail=detail), len(groups)
    mask = counted[worst]
    was, now = champion.correct[mask].mean(), challenger.correct[mask].mean()
    return Check(
        name="class drop",
        value=drops[worst],
        threshold=limit,
        passed=drops[worst] <= limit + 1e-12,  # a difference of two shares is not exact
        detail=f"the largest is {worst}: {was:.2%} → {now:.2%} of {mask.sum():,} images; at most {limit:.2%} lost",
    ), len(groups) - len(counted)


def _limit(name: str, value: float | None, limit: float, unit: str) -> Check:
    if value is None:
        return Check(name=name, value=None, threshold=limit, passed=False, detail="it was not measured")
    return Check(
        name=name, value=value, threshold=limit, passed=value <= limit, detail=f"{value:,.5g} {unit}, at most {limit:,}"
    )
