"""Calibration: does a network that says 90 % keep its word in nine of ten cases, and one number that mends it.

Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks", ICML 2017.
"""

import math

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from cnn.errors import InputError

BINS = 15
"""Of equal width, as in the paper."""

LOWEST, HIGHEST = 0.05, 20.0
"""Temperatures are kept between these: on a split without a mistake the likeliest one would be 0."""


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T for which softmax(logits / T) gives the labels the least mean cross-entropy.

    In 1/T the cross-entropy is convex, so Newton's method inside a bracket finds the one minimum, without a random
    start and without a step size. Fit it on the validation split: neither the weights nor the test know of it then.

    Args:
        logits: float N×classes, N ≥ 1.
        labels: int64 N.

    Returns:
        T in 0.05 … 20, to six decimals; above 1 for a network that is too sure of itself.

    Raises:
        InputError: there is no image, or a logit is not finite.
    """
    if not len(logits) or not bool(logits.isfinite().all()):
        raise InputError("a temperature needs at least one image, and logits that are finite")
    scores = logits.double()
    scores = scores - scores.amax(1, keepdim=True)  # changes no probability, and keeps the squares small
    wanted = scores.gather(1, labels[:, None]).mean()
    inverse, low, high = 1.0, 1 / HIGHEST, 1 / LOWEST
    for _ in range(100):
        probabilities = (inverse * scores).softmax(1)
        mean = (probabilities * scores).sum(1)
        slope = float(mean.mean() - wanted)
        curvature = float(((probabilities * scores.square()).sum(1) - mean.square()).mean())
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        newton = inverse - slope / curvature if curvature > 0 else math.inf
        last, inverse = inverse, newton if low < newton < high else math.sqrt(low * high)
        if abs(inverse - last) <= 1e-10 * last:
            break
    return round(1 / inverse, 6)


class Reliability(BaseModel):
    """Images in bins of equal width by the probability of their predicted class; 0.0 in bins without any."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    counts: tuple[int, ...]
    confidence: tuple[float, ...]
    """Mean probability of the predicted class."""

    accuracy: tuple[float, ...]
    """Share of the images that are right."""

    @property
    def ece(self) -> float:
        """Expected calibration error: the mean distance between confidence and accuracy, weighted by images."""
        bins = zip(self.counts, self.confidence, self.accuracy, strict=True)
        return sum(count * abs(sure - right) for count, sure, right in bins) / sum(self.counts)


def reliability(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> Reliability:
    """Compare what a network promises with what it keeps.

    Args:
        probabilities: float N×classes, N ≥ 1.
        labels: int64 N.
        bins: a bin holds its lower edge; the last one also its upper one.
    """
    confidence, predicted = probabilities.double().max(1)
    places = (confidence * bins).long().clamp_max(bins - 1)
    counts = places.bincount(minlength=bins)
    sums = (places.bincount(values, bins) for values in (confidence, (predicted == labels).double()))
    sure, right = (tuple((total / counts.clamp_min(1)).tolist()) for total in sums)
    return Reliability(counts=tuple(counts.tolist()), confidence=sure, accuracy=right)
