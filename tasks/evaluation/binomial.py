"""Binomial and normal probabilities, exactly, by `scipy.special`: `scipy.stats`, which has the same, loads for seconds.

Arrays are taken element by element.
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, bdtrc, ndtr, ndtri

Floats = NDArray[np.float64]


def at_most(successes: ArrayLike, trials: ArrayLike, probability: ArrayLike) -> Floats:
    """Returns how probable so many successes are, or fewer."""
    found: Floats = bdtr(np.asarray(successes, dtype=np.float64), np.asarray(trials, dtype=np.int64), probability)
    return found


def sign_test(wins: int, losses: int) -> float:
    """Returns how probable so many wins are, or more, if a loss is as probable; 1 without any."""
    return float(bdtrc(wins - 1, wins + losses, 0.5)) if wins else 1.0


def normal_tail(score: ArrayLike) -> Floats:
    """Returns how probable a standard normal figure above this is."""
    found: Floats = ndtr(-np.asarray(score, dtype=np.float64))
    return found


def normal_score(tail: float) -> float:
    """Returns the figure that a standard normal one exceeds with this probability."""
    return -float(ndtri(tail))


def wilson_interval(successes: int, trials: int, confidence: float) -> tuple[float, float]:
    """Returns Wilson's interval for the probability of a success (1927), without a correction for continuity."""
    z = normal_score((1 - confidence) / 2)
    share, width = successes / trials, 1 + z**2 / trials
    centre = (share + z**2 / (2 * trials)) / width
    half = z / width * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return (centre - half if successes else 0.0), (centre + half if successes < trials else 1.0)
