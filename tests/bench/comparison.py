"""Two things measured in turns."""

import ctypes
import importlib.metadata
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from cnn.training.reports import EpochReport, StepReport
from cnn.training.trainer import Trainer


@dataclass(frozen=True)
class Side:
    """One of two things to compare."""

    label: str
    measure: Callable[[], float]
    """Does a round and returns its figure."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Figures of two things, round by round."""

    name: str
    ours_label: str
    theirs_label: str
    unit: str
    ours: tuple[float, ...]
    theirs: tuple[float, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """Ours by theirs, each round."""
        return tuple(a / b for a, b in zip(self.ours, self.theirs, strict=True))

    def as_dict(self) -> dict[str, object]:
        return asdict(self) | {"ratios": self.ratios, "median_ratio": statistics.median(self.ratios)}


class LeftOut(Exception):
    """What a comparison needs is missing: a package (see requirements.txt here) or an option."""


def require(package: str) -> str:
    """The version of a package of `requirements.txt`; raises LeftOut."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise LeftOut(f"{package} is not installed") from None


def keep_memory() -> None:
    """Have the C library keep freed memory, so that page faults slow neither side.

    Otherwise they slow whichever side allocates the larger blocks: the bare loop, by up to a third.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)


def rate(work: Callable[[], float], *, calls: int = 1) -> Callable[[], float]:
    """A measure: what `calls` calls of `work` do, by its own account, per second."""

    def measure() -> float:
        began = time.perf_counter()
        amount = sum(work() for _ in range(calls))
        return amount / (time.perf_counter() - began)

    return measure


def compare(
    name: str, ours: Side, theirs: Side, *, rounds: int, unit: str = "img/s", warm_up: bool = True
) -> Comparison:
    """Measure both in every round, changing who is first; a warm-up round is not counted."""
    figures: dict[Side, list[float]] = {ours: [], theirs: []}
    for number in range(rounds + warm_up):
        for side in (ours, theirs) if number % 2 else (theirs, ours):
            figures[side].append(side.measure())
    first = int(warm_up)
    return Comparison(
        name=name,
        ours_label=ours.label,
        theirs_label=theirs.label,
        unit=unit,
        ours=tuple(figures[ours][first:]),
        theirs=tuple(figures[theirs][first:]),
    )


def fastest(sides: Sequence[Side]) -> Side:
    """The side with the highest figure in a round, after a warm-up round of each."""
    for side in sides:
        side.measure()
    return max(sides, key=lambda side: side.measure())


class Quiet:
    """Reports nothing of a training."""

    def on_step(self, report: StepReport) -> None: ...

    def on_epoch(self, report: EpochReport) -> None: ...

    def after_step(self, trainer: Trainer, *, milestone: bool) -> None: ...
