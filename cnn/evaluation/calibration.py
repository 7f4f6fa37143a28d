"""Measures calibration (are predictions made with 90 % confidence right in 90 % of cases?), and fits a temperature.

Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks", ICML 2017.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from cnn.data.manifest import Record
from cnn.errors import InputError

BINS = 15
"""Number of bins of equal width, as in the paper."""

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0

PRIOR_STD = 0.2
"""Standard deviation of the Gaussian prior on log T, whose mean is 0."""

FOLDS = 5


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Returns the temperature T for which softmax(logits / T) gives the labels a small mean cross-entropy, or 1.

    On few images, or on images without a mistake, the temperature of least cross-entropy is far from the one that
    other images need, down to 0. So a Gaussian prior keeps log T near 0, one image's worth of labels is spread over all
    images and classes (as in Platt, "Probabilistic Outputs for Support Vector Machines", 1999), and T stays 1 unless
    temperatures fitted to four fifths of the images give the remaining fifth a smaller cross-entropy, by more than two
    standard errors. T also stays 1 if no image is misclassified: such images cannot show overconfidence. The strengths
    were chosen on simulated and real splits of 30 to 10 000 images.

    Fit T on the validation split: the weights were not trained on it, and the test images stay unused.

    Args:
        logits: float N×classes, N ≥ 1.
        labels: int64 N.

    Returns:
        T in 0.05 … 20, to six decimals; above 1 for an overconfident network.

    Raises:
        InputError: there are no images, or a logit is not finite.
    """
    if not len(logits) or not bool(logits.isfinite().all()):
        raise InputError("a temperature needs at least one image, and logits that are finite")
    scores = logits.double()
    scores = scores - scores.amax(1, keepdim=True)  # changes no probability, and keeps the squares small
    return round(1 / _inverse_temperature(scores, labels), 6) if _improves_held_out(scores, labels) else 1.0


def temperature_note(temperature: float) -> str:
    """Returns a note about a fitted temperature for readers of the report; empty if none is needed."""
    if temperature in (MIN_TEMPERATURE, MAX_TEMPERATURE):
        return f"the temperature is at its limit of {temperature:g}: do not rely on the probabilities"
    if temperature == 1:
        return "probabilities stay as trained: no fitted temperature improves them reliably on other images"
    return ""


def _improves_held_out(scores: Tensor, labels: Tensor) -> bool:
    """Checks whether fitted temperatures lower the cross-entropy of held-out images, beyond chance."""
    count = len(scores)
    if count < 2 or bool((scores.argmax(1) == labels).all()):
        return False
    gains = torch.empty(count, dtype=torch.float64)
    folds = min(FOLDS, count)
    fold = torch.arange(count) % folds
    for each in range(folds):
        held, rest = fold == each, fold != each
        scaled = _inverse_temperature(scores[rest], labels[rest]) * scores[held]
        losses = (F.cross_entropy(values, labels[held], reduction="none") for values in (scores[held], scaled))
        gains[held] = next(losses) - next(losses)
    return float(gains.mean()) > 2 * float(gains.std()) / math.sqrt(count)


def _inverse_temperature(scores: Tensor, labels: Tensor) -> float:
    """Returns the likeliest 1/T, by Newton's method in a bracket, which needs no random start and no step size."""
    count = len(scores)
    spread = 1 / (count + 1)  # share of the labels' weight that goes to all classes, so that a small T always costs
    wanted = (1 - spread) * scores.gather(1, labels[:, None]).mean() + spread * scores.mean()
    inverse, low, high = 1.0, 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
    strength = 1 / (count * PRIOR_STD**2)
    for _ in range(100):
        probabilities = (inverse * scores).softmax(1)
        mean = (probabilities * scores).sum(1)
        slope = float(mean.mean() - wanted) + strength * math.log(inverse) / inverse
        curvature = float(((probabilities * scores.square()).sum(1) - mean.square()).mean())
        curvature += strength * (1 - math.log(inverse)) / inverse**2
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        newton = inverse - slope / curvature if curvature > 0 else math.inf
        last, inverse = inverse, newton if low < newton < high else math.sqrt(low * high)
        if abs(inverse - last) <= 1e-10 * last:
            break
    return inverse


class Reliability(Record):
    """Confidence and accuracy of images in bins of equal width by confidence; 0.0 in empty bins."""

    counts: tuple[int, ...]
    confidence: tuple[float, ...]
    """Mean probability of the predicted class."""

    accuracy: tuple[float, ...]
    """Share of images that are classified correctly."""

    @property
    def ece(self) -> float:
        """Expected calibration error: the mean difference of confidence and accuracy, weighted by images."""
        bins = zip(self.counts, self.confidence, self.accuracy, strict=True)
        return sum(count * abs(sure - right) for count, sure, right in bins) / sum(self.counts)


def reliability(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> Reliability:
    """Compares the confidence of predictions with their accuracy.

    Args:
        probabilities: float N×classes, N ≥ 1.
        labels: int64 N.
        bins: number of bins; a bin contains its lower edge, the last bin also its upper edge.
    """
    confidence, predicted = probabilities.double().max(1)
    places = (confidence * bins).long().clamp_max(bins - 1)
    counts = places.bincount(minlength=bins)
    sums = (places.bincount(values, bins) for values in (confidence, (predicted == labels).double()))
    sure, right = (tuple((total / counts.clamp_min(1)).tolist()) for total in sums)
    return Reliability(counts=tuple(counts.tolist()), confidence=sure, accuracy=right)
