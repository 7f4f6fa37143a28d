"""Compares two accuracies measured on the same images, by the images that only one of the two versions has right.

Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample design",
Statistics in Medicine 17:891 (1998).
"""

import numpy as np
from numpy.typing import ArrayLike

from tasks.evaluation.binomial import Floats, at_most, normal_tail

BISECTIONS = 40


def tango(wins: ArrayLike, losses: ArrayLike, images: int, difference: float) -> Floats:
    """Returns Tango's score: standard deviations by which the gain, (wins − losses) / images, exceeds a difference.

    Args:
        wins: images that only the first version has right; arrays are taken element by element.
        losses: images that only the second version has right.
        images: number of compared images, at least 1.
        difference: assumed difference between the true accuracies, in −1 … 1.
    """
    b, c = np.asarray(wins, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    linear = (2 * images - b + c) * difference - b - c
    root = np.sqrt(np.maximum(linear**2 + 8 * images * c * difference * (1 - difference), 0))
    losing = (root - linear) / (4 * images)  # maximum-likelihood probability of a loss under this difference
    variance = images * (2 * losing + difference * (1 - difference))
    excess = b - c - images * difference
    score: Floats = excess / np.sqrt(np.maximum(variance, 1e-300))
    return score


def p_worse(wins: ArrayLike, losses: ArrayLike, images: int, margin: float) -> Floats:
    """Returns the probability of this or a better result if the first's true accuracy is `margin` below the second's.

    Where the two agree on nearly all images, the score alone errs up to 6 % of the time at a level of 5 %. So the
    number of losses must also be improbably small, by the exact binomial probability with a loss rate of
    margin + wins / images. Without any disagreement this is the rule of three: a level of 5 % needs 3 / margin images.

    Args:
        margin: negative if the first version's true accuracy is above the second's.
    """
    score = normal_tail(tango(wins, losses, images, -margin))
    if margin <= 0:
        return score
    losing = np.minimum(margin + np.asarray(wins) / images, 1)
    exact: Floats = np.maximum(score, at_most(losses, images, losing))
    return exact


def p_no_worse(wins: ArrayLike, losses: ArrayLike, images: int, margin: float) -> Floats:
    """Returns the probability of this or a worse result if the first's true accuracy is `margin` below the second's."""
    return normal_tail(-tango(wins, losses, images, -margin))


def lower_bound(wins: int, losses: int, images: int, alpha: float) -> float:
    """Returns the lower confidence bound (1 − alpha) of the difference between the true accuracies: see `p_worse`."""
    low, high = -1.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if p_worse(wins, losses, images, -middle) <= alpha else (low, middle)
    return low
