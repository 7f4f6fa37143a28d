"""Detects ranks that slow down all others."""

from cnn.training.reports import StepReport


class StragglerWatch:
    """Detects a rank that computes more slowly than the others for many steps in a row.

    Args:
        factor: a rank is slow if its time is more than this many times the median.
        steps: number of slow steps in a row until a rank is named.
    """

    def __init__(self, factor: float = 1.5, steps: int = 100) -> None:
        self._factor, self._steps = factor, steps
        self._slow: dict[int, int] = {}  # steps in a row
        self._named: set[int] = set()

    def check(self, report: StepReport) -> list[int]:
        """Returns the ranks to name now; each rank is named once."""
        seconds = report.rank_seconds
        median = sorted(seconds)[(len(seconds) - 1) // 2] if seconds else 0.0  # the lower one: of two ranks, the faster
        slow = [rank for rank, each in enumerate(seconds) if each > self._factor * median]
        self._slow = {rank: self._slow.get(rank, 0) + report.steps for rank in slow}
        new = [rank for rank, steps in self._slow.items() if steps >= self._steps and rank not in self._named]
        self._named |= set(new)
        return new
