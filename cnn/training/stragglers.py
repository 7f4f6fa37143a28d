"""Notices ranks that hold up all others."""

from cnn.training.reports import StepReport


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
