"""The figures that ranks share in each step: their positions in one vector, and their reports."""

import math
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from cnn.training.reports import StepReport
from cnn.training.step_clock import StepTimes

REPORTS_PER_EPOCH = 50  # less than twice as many; each covers equally many steps


class StepFigures:
    """The positions of a step's figures in one float64 vector, which is summed over all lanes."""

    def __init__(self, lanes: int, ranks: int) -> None:
        self.lanes = lanes
        self.losses = slice(0, lanes)  # of each lane
        self.correct, self.votes = lanes, lanes + 1  # images classified correctly; ranks that want to stop
        self.seconds = slice(lanes + 2, lanes + 2 + ranks)  # computing time of each rank; 0.0 if not known yet
        self.data, self.exchange = lanes + 2 + ranks, lanes + 3 + ranks  # waiting times, summed over the ranks
        self.norm = lanes + 4 + ranks  # the gradient's norm, which is appended to the sum

    def pack(
        self,
        lane: int,
        *,
        loss: Tensor,
        correct: Tensor,
        rank: int,
        vote: bool = False,
        times: StepTimes = StepTimes(),  # noqa: B008 (immutable)
    ) -> Tensor:
        """Returns a lane's part of the vector, on the loss's device. One lane per rank sets `vote` and `times`."""
        figures = torch.zeros(self.norm, dtype=torch.float64)
        figures[self.votes] = vote
        figures[self.seconds.start + rank], figures[self.data], figures[self.exchange] = times
        figures = figures.to(loss.device, non_blocking=True)
        figures[lane] = loss
        figures[self.correct] = correct
        return figures


class StepReports:
    """Averages the figures of steps into reports, which are equal on every rank.

    Args:
        steps_per_epoch: an epoch's last report may cover fewer steps than the others.
    """

    def __init__(self, figures: StepFigures, *, batch_size: int, steps_per_epoch: int) -> None:
        self._figures, self._batch_size, self._steps_per_epoch = figures, batch_size, steps_per_epoch
        self._every = max(1, steps_per_epoch // REPORTS_PER_EPOCH)
        self.in_flight: deque[tuple[int, float, Tensor, torch.cuda.Event | None]] = deque()
        """Step, learning rate, figures and, for figures from a GPU, the event of their arrival."""

        self._seconds: list[list[float]] = []
        self.recent: list[list[float]] = []
        """Loss, accuracy, gradient norm and learning rate of each step of the next report."""

        self.vote_step = self.broken_step = math.inf
        """First step with a vote to stop, and first step with figures that are not finite, among those read so far."""

    def add(self, step: int, rate: float, figures: Tensor) -> None:
        """Adds the figures of a step and its learning rate, without waiting for the device."""
        copied = None
        if figures.is_cuda:
            on_device = figures
            figures = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
            figures.copy_(on_device, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        self.in_flight.append((step, rate, figures, copied))

    def until(self, last: int) -> Iterator[StepReport]:
        """Reads the figures of the steps up to and including `last`; yields the reports that are then complete."""
        while self.in_flight and self.in_flight[0][0] <= last and math.isinf(self.broken_step):
            step, rate, figures, copied = self.in_flight.popleft()
            if copied:
                copied.synchronize()
            values, at = figures.tolist(), self._figures
            loss, norm = sum(values[at.losses]) / at.lanes, values[at.norm]
            if not math.isfinite(loss + norm):
                self.broken_step = step
                return  # later figures are worthless
            if values[at.votes]:
                self.vote_step = min(self.vote_step, step)
            self.recent.append([loss, values[at.correct] / self._batch_size, norm, rate])
            if all(values[at.seconds]):
                ranks = len(values[at.seconds])
                self._seconds.append([*values[at.seconds], values[at.data] / ranks, values[at.exchange] / ranks])
            if step % self._steps_per_epoch % self._every == 0:
                yield self._report(step)

    def _report(self, step: int) -> StepReport:
        loss, accuracy, norm, _ = (_mean(column) for column in zip(*self.recent, strict=True))
        *rank_seconds, data, exchange = [_mean(column) for column in zip(*self._seconds, strict=True)] or (0.0, 0.0)
        report = StepReport(
            step=step,
            steps=len(self.recent),
            loss=loss,
            accuracy=accuracy,
            gradient_norm=norm,
            learning_rate=self.recent[-1][3],
            rank_seconds=tuple(rank_seconds),
            data_seconds=data,
            exchange_seconds=exchange,
        )
        self.recent.clear()
        self._seconds.clear()
        return report


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)
