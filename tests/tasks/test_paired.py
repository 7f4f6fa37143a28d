"""Errors and power of the paired comparison, by exact enumeration of all possible results."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import xlogy
from scipy.stats import binom

from tasks.config.gates import GateConfig
from tasks.evaluation.paired import lower_bound, p_worse, tango

ALPHA = 0.05
Counts = NDArray[np.int64]


def results(images: int, win: float, lose: float) -> tuple[Counts, Counts, NDArray[np.float64]]:
    """Returns all likely wins and losses, [W×1] and [1×L], and their multinomial probabilities [W×L]."""
    tail = 1e-8
    wins, losses = (
        np.arange(binom.ppf(tail, images, p), binom.isf(tail, images, p) + 1, dtype=np.int64) for p in (win, lose)
    )
    wins, losses = wins[:, None], losses[None]
    return wins, losses, binom.pmf(wins, images, win) * binom.pmf(losses, images - wins, lose / (1 - win))


def passes(images: int, disagree: float, difference: float, margin: float | None = None) -> float:
    """Returns the probability of a pass if the true difference of the accuracies is `difference`."""
    config = GateConfig(alpha=ALPHA, margin=margin)
    if not config.can_pass(images):
        return 0.0
    wins, losses, chance = results(images, (disagree + difference) / 2, (disagree - difference) / 2)
    return float(chance[p_worse(wins, losses, images, config.margin_on(images)) <= ALPHA].sum())


@pytest.mark.parametrize("images", [100, 200, 300, 450, 541, 600, 1000, 1226, 3000, 10_000])
def test_wrong_yes_is_as_rare_as_promised(images: int) -> None:
    """The true loss is exactly the margin; the share of disagreement runs from the smallest possible one."""
    for margin in (None, 0.005, 0.01, 0.02):
        at = GateConfig(margin=margin).margin_on(images)
        for disagree in {at, *(share for share in (0.005, 0.0075, 0.01, 0.02, 0.05, 0.1, 0.2) if share > at)}:
            assert passes(images, disagree, -at, margin) <= 0.053, (images, margin, disagree)


@pytest.mark.parametrize(
    ("images", "disagree", "power"),
    [(600, 0.005, 0.38), (1000, 0.005, 0.58), (1000, 0.02, 0.28), (10_000, 0.02, 0.96), (10_000, 0.05, 0.71)],
)
def test_equally_good_versions_pass_as_often_as_is_known(images: int, disagree: float, power: float) -> None:
    assert power <= passes(images, disagree, 0.0) <= power + 0.03


def test_version_that_lost_twice_the_margin_hardly_ever_passes() -> None:
    assert passes(200, 0.03, -0.03) < 0.02
    assert passes(10_000, 0.01, -0.01) < 0.001


@pytest.mark.parametrize(("images", "margin"), [(100, 0.0299), (200, 0.005), (599, 0.005), (1000, 0.0029)])
def test_nothing_passes_where_the_split_cannot_show_the_margin(images: int, margin: float) -> None:
    assert passes(images, 0.05, 0.0, margin) == 0


def test_no_disagreement_is_the_rule_of_three() -> None:
    for images in (100, 1000, 10_000):
        assert lower_bound(0, 0, images, ALPHA) == pytest.approx(ALPHA ** (1 / images) - 1, rel=1e-6)


@pytest.mark.parametrize(("wins", "losses", "difference"), [(12, 5, 0.0), (3, 9, -0.05), (0, 2, -0.1), (9, 1, 0.3)])
def test_score_is_tangos(wins: int, losses: int, difference: float) -> None:
    """The standard deviation is that of the likeliest multinomial with this difference, found here by a search."""
    images = 60

    def surprise(losing: float) -> float:
        shares = np.array([losing + difference, losing, 1 - 2 * losing - difference])
        return -float(xlogy([wins, losses, images - wins - losses], shares).sum())

    bounds = max(-difference, 0) + 1e-12, (1 - difference) / 2
    losing = minimize_scalar(surprise, bounds=bounds, method="bounded", options={"xatol": 1e-10}).x
    deviation = np.sqrt(images * (2 * losing + difference - difference**2))
    expected = (wins - losses - images * difference) / deviation
    assert float(tango(wins, losses, images, difference)) == pytest.approx(expected, abs=1e-3)
    if not difference:
        assert expected == pytest.approx((wins - losses) / np.sqrt(wins + losses), abs=1e-3)  # McNemar's


def test_bound_is_where_the_test_turns() -> None:
    bound = lower_bound(12, 5, 50, 0.025)
    assert float(tango(12, 5, 50, bound)) == pytest.approx(1.959964, abs=1e-4)
    assert p_worse(12, 5, 50, -bound) == pytest.approx(0.025, abs=1e-6)
