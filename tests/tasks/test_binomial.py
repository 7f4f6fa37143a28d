"""Probabilities, against those of scipy.stats."""

import numpy as np
import pytest
from scipy.stats import binom, binomtest, norm

from tasks.evaluation.binomial import at_most, highest_share, normal_score, normal_tail, sign_test, wilson_interval


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (0, 5), (5, 0), (1, 1), (100, 80), (4000, 4200)])
def test_sign_test_is_the_binomial_test(wins: int, losses: int) -> None:
    theirs = binomtest(wins, wins + losses, alternative="greater").pvalue if wins + losses else 1.0
    assert sign_test(wins, losses) == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (3, 10), (10, 10), (1, 1), (9999, 10000)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.999])
def test_interval_is_wilsons(successes: int, trials: int, confidence: float) -> None:
    theirs = binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    assert wilson_interval(successes, trials, confidence) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.999])
def test_upper_bound_is_that_of_clopper_and_pearson(confidence: float) -> None:
    counts, trials = [0, 3, 10, 1, 9999], [10, 10, 10, 1, 10000]
    theirs = [
        binomtest(k, n, alternative="less").proportion_ci(confidence, method="exact").high
        for k, n in zip(counts, trials, strict=True)
    ]
    assert highest_share(counts, trials, confidence) == pytest.approx(theirs, abs=1e-9)
    assert highest_share(0, 0, confidence) == 1


def test_probabilities_are_those_of_scipy_element_by_element() -> None:
    counts = np.arange(0, 1001, 7)
    for probability in (1e-6, 0.003, 0.5, 1.0):
        assert at_most(counts, 1000, probability) == pytest.approx(binom.cdf(counts, 1000, probability), rel=1e-9)
    scores = np.linspace(-9, 9, 37)
    assert normal_tail(scores) == pytest.approx(norm.sf(scores), rel=1e-9)
    assert [normal_score(tail) for tail in (0.5, 0.05, 1e-9)] == pytest.approx(norm.isf([0.5, 0.05, 1e-9]))
