"""Figures that lanes pack into a step's vector are read from it unchanged."""

import torch

from cnn.training.step_clock import StepTimes
from cnn.training.step_figures import StepFigures, StepReports


def test_reports_say_what_the_lanes_of_all_ranks_have_packed() -> None:
    figures = StepFigures(lanes=4, ranks=2)
    reports = StepReports(figures, batch_size=16, steps_per_epoch=2)
    for step in (1, 2):
        told = {lane: {"vote": step == lane == 2, "times": StepTimes(float(step + lane), 0.5, lane)} for lane in (0, 2)}
        parts = [
            figures.pack(
                lane,
                loss=torch.tensor(lane + step),
                correct=torch.tensor(lane),
                rank=lane // 2,
                **told.get(lane, {}),
            )
            for lane in range(4)
        ]
        reports.add(step, 0.1 * step, torch.cat([torch.stack(parts).sum(0), torch.tensor([3.0])]))
    first, second = reports.until(2)
    assert (first.loss, first.accuracy, first.gradient_norm, first.learning_rate) == (2.5, 6 / 16, 3, 0.1)
    assert (first.step, second.step, second.loss) == (1, 2, 3.5)
    assert (first.rank_seconds, second.rank_seconds) == ((1, 3), (2, 4))
    assert (first.data_seconds, first.exchange_seconds) == (0.5, 1)
    assert (reports.vote_step, reports.in_flight) == (2, type(reports.in_flight)())


def test_nothing_is_reported_from_the_first_step_on_that_is_not_finite() -> None:
    figures = StepFigures(lanes=1, ranks=1)
    reports = StepReports(figures, batch_size=2, steps_per_epoch=3)
    for step, loss in ((1, 1.0), (2, float("nan")), (3, 1.0)):
        part = figures.pack(0, loss=torch.tensor(loss), correct=torch.tensor(1), rank=0)
        reports.add(step, 0.1, torch.cat([part, torch.tensor([0.5])]))
    assert [report.step for report in reports.until(1)] == [1]
    assert reports.broken_step > 1
    assert list(reports.until(3)) == []
    assert reports.broken_step == 2
