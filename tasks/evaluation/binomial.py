"""Exact binomial and normal probabilities by `scipy.special`: `scipy.stats` has the same, but takes seconds to import.

Array arguments are taken element by element.
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, bdtrc, bdtri, ndtr, ndtri

Floats = NDArray[np.float64]

CONFIDENCE = 0.95  # of every interval in reports and verdicts


def at_most(successes: ArrayLike, trials: ArrayLike, probability: ArrayLike) -> Floats:
    """Returns the probability of at most this many successes."""
    found: Floats = bdtr(np.asarray(successes, dtype=np.float64), np.asarray(trials, dtype=np.int64), probability)
    return found


def highest_share(successes: ArrayLike, trials: ArrayLike, confidence: float = CONFIDENCE) -> Floats:
    """Returns the upper confidence bound, one-sided, of the probability of a success; 1 without trials.

    Clopper and Pearson, The use of confidence or fiducial limits, Biometrika 26 (1934): it is exact.
    """
    k, n = np.asarray(successes, dtype=np.float64), np.asarray(trials, dtype=np.int64)
    return np.where(k < n, bdtri(k, np.maximum(n, 1), 1 - confidence), 1.0)


def sign_test(wins: int, losses: int) -> float:
    """Returns the probability of at least this many wins if wins and losses are equally likely; 1 without wins."""
    return float(bdtrc(wins - 1, wins + losses, 0.5)) if wins else 1.0


def normal_tail(score: ArrayLike) -> Floats:
    """Returns the probability that a standard normal variable exceeds the score."""
    found: Floats = ndtr(-np.asarray(score, dtype=np.float64))
    return found


def normal_score(tail: float) -> float:
    """Returns the score that a standard normal variable exceeds with this probability."""
    return -float(ndtri(tail))


def wilson_interval(successes: int, trials: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Returns Wilson's interval (1927) for the probability of a success, without continuity correction."""
    z = normal_score((1 - confidence) / 2)
    share, width = successes / trials, 1 + z**2 / trials
    centre = (share + z**2 / (2 * trials)) / width
    half = z / width * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return (centre - half if successes else 0.0), (centre + half if successes < trials else 1.0)
