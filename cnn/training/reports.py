"""What a training says of itself; equal on every rank, the ranks' own times included."""

from dataclasses import dataclass

from cnn.evaluation.evaluate import Score


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """Means over the `steps` steps that end with `step`, which counts from 1."""

    step: int
    steps: int
    loss: float
    accuracy: float
    """Of the augmented images."""

    gradient_norm: float
    """Before clipping."""

    learning_rate: float
    """Of the last step."""

    rank_seconds: tuple[float, ...]
    """Seconds a step that each rank computed, without the time it waited for others; empty if not known yet."""


@dataclass(frozen=True, kw_only=True)
class EpochReport:
    """What the validation split says after an epoch. `epoch` and `step` count from 1."""

    epoch: int
    step: int
    val: Score


class StragglerWatch:
    """Notices a rank that computes slower than the others for many steps in a row.

    Args:
        factor: how many times the median of all ranks is slow.
        steps: in a row, until it is named.
    """

    def __init__(self, factor: float = 1.5, steps: int = 100) -> None:
        self._factor, self._steps = factor, steps
        self._slow: dict[int, int] = {}  # steps in a row
        self._named: set[int] = set()

    def look(self, report: StepReport) -> list[int]:
        """The ranks to name now; each is named once."""
        seconds = report.rank_seconds
        median = sorted(seconds)[(len(seconds) - 1) // 2] if seconds else 0.0  # the lower one: of two, the faster
        slow = [rank for rank, each in enumerate(seconds) if each > self._factor * median]
        self._slow = {rank: self._slow.get(rank, 0) + report.steps for rank in slow}
        new = [rank for rank, steps in self._slow.items() if steps >= self._steps and rank not in self._named]
        self._named |= set(new)
        return new
