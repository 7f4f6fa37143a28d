"""The learning rate over the steps: values at start, peak and end."""

import itertools

import pytest

from cnn.config.training import TrainConfig
from cnn.training.schedule import learning_rate

STEPS = 100
ANNEALED = ("one-cycle", "cosine")


def rates(**keys: object) -> list[float]:
    config = TrainConfig.model_validate({"lr": 0.5, "warmup": 0.2, **keys})
    return [learning_rate(config, step, STEPS) for step in range(STEPS)]


@pytest.mark.parametrize("schedule", ANNEALED)
def test_rate_rises_linearly_over_the_warmup_then_falls_to_the_end(schedule: str) -> None:
    found = rates(schedule=schedule)
    assert found[0] == pytest.approx(0.5 / 21)
    assert found[:20] == pytest.approx([0.5 * (step + 1) / 21 for step in range(20)])
    assert found.index(max(found)) == 20
    assert max(found) == pytest.approx(0.5, rel=0.02)
    assert all(later < earlier for earlier, later in itertools.pairwise(found[20:]))
    assert 0 < found[-1] < 0.01


def test_one_cycle_falls_in_equal_parts() -> None:
    falls = [earlier - later for earlier, later in itertools.pairwise(rates(schedule="one-cycle")[20:])]
    assert falls == pytest.approx([0.5 / 81] * 79)


def test_cosine_falls_slowly_then_fast_then_slowly_and_is_half_in_the_middle() -> None:
    found = rates(schedule="cosine", warmup=0)
    falls = [earlier - later for earlier, later in itertools.pairwise(found)]
    assert falls[49] > 5 * max(falls[0], falls[-1])
    assert (found[49] + found[50]) / 2 == pytest.approx(0.25)


def test_constant_rate_does_not_warm_up() -> None:
    assert set(rates(schedule="constant")) == {0.5}


@pytest.mark.parametrize("schedule", ANNEALED)
@pytest.mark.parametrize("warmup", [0.0, 0.2, 0.99])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_short_trainings_have_rates_above_zero_and_not_above_the_peak(schedule: str, warmup: float, steps: int) -> None:
    config = TrainConfig.model_validate({"schedule": schedule, "warmup": warmup, "lr": 0.5})
    assert all(0 < learning_rate(config, step, steps) <= 0.5 for step in range(steps))
