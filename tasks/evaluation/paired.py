"""Compares two accuracies that were measured on the same images, by the images that only one of the two has right.

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
        wins: images that only the first has right; arrays are taken element by element.
        losses: images that only the second has right.
        images: those compared, at least 1.
        difference: of the two true accuracies, in −1 … 1.
    """
    b, c = np.asarray(wins, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    linear = (2 * images - b + c) * difference - b - c
    root = np.sqrt(np.maximum(linear**2 + 8 * images * c * difference * (1 - difference), 0))
    losing = (root - linear) / (4 * images)  # likeliest probability of a loss, if this is the true difference
    variance = images * (2 * losing + difference * (1 - difference))
    excess = b - c - images * difference
    score: Floats = excess / np.sqrt(np.maximum(variance, 1e-300))
    return score


def p_worse(wins: ArrayLike, losses: ArrayLike, images: int, margin: float) -> Floats:
    """Returns how probable so good a result is, at most, if the first's true accuracy is `margin` below the second's.

    Where the two agree on nearly all images, the score alone is wrong up to 6 % of the time at 5 %. So the number of
    losses has to be improbably small as well, for a probability of a loss of margin + wins / images, exactly. Without
    any disagreement this is the rule of three: 5 % need 3 / margin images.

    Args:
        margin: negative for a first one that is better by so much.
    """
    score = normal_tail(tango(wins, losses, images, -margin))
    if margin <= 0:
        return score
    losing = np.minimum(margin + np.asarray(wins) / images, 1)
    exact: Floats = np.maximum(score, at_most(losses, images, losing))
    return exact


def p_no_worse(wins: ArrayLike, losses: ArrayLike, images: int, margin: float) -> Floats:
    """Returns how probable so bad a result is, at most, if the first's true accuracy is `margin` below the second's."""
    return normal_tail(-tango(wins, losses, images, -margin))


def lower_bound(wins: int, losses: int, images: int, alpha: float) -> float:
    """Returns the difference of the accuracies that the true one exceeds with confidence 1 − alpha: see `p_worse`."""
    low, high = -1.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if p_worse(wins, losses, images, -middle) <= alpha else (low, middle)
    return low
