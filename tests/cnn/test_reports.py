"""A rank that is slow for long is named, once."""

from cnn.training.reports import StepReport
from cnn.training.stragglers import StragglerWatch


def report(*seconds: float, steps: int = 10) -> StepReport:
    return StepReport(
        step=1, steps=steps, loss=1, accuracy=0, gradient_norm=1, learning_rate=1, rank_seconds=tuple(seconds)
    )


def test_rank_that_is_slow_for_enough_steps_in_a_row_is_named_once() -> None:
    watch = StragglerWatch(factor=1.5, steps=30)
    assert [watch.check(report(0.1, 0.1, 0.2, 0.1)) for _ in range(6)] == [[], [], [2], [], [], []]


def test_of_two_ranks_the_slower_one_is_found() -> None:
    watch = StragglerWatch(factor=1.5, steps=10)
    assert watch.check(report(0.1, 0.16)) == [1]


def test_rank_that_catches_up_now_and_then_is_not_named() -> None:
    watch = StragglerWatch(factor=1.5, steps=30)
    for _ in range(5):
        assert watch.check(report(0.2, 0.1, steps=20)) == []
        assert watch.check(report(0.1, 0.1)) == []


def test_unknown_times_name_no_rank() -> None:
    assert StragglerWatch(steps=1).check(report()) == []
