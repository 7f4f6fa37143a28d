"""Temperatures and calibration errors, against a search and against torchmetrics."""

import pytest
import torch
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

from cnn.calibration import HIGHEST, LOWEST, fit_temperature, reliability
from cnn.errors import InputError


def promises(temperature: float, count: int = 20_000, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are `temperature` times too large for the labels, which are drawn from what they mean."""
    generator = torch.Generator().manual_seed(0)
    honest = 2 * torch.randn(count, classes, generator=generator)
    labels = torch.multinomial(honest.softmax(1), 1, generator=generator).squeeze(1)
    return honest * temperature, labels


@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0])
def test_temperature_that_the_labels_were_drawn_with_is_found(temperature: float) -> None:
    logits, labels = promises(temperature)
    assert fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.03)


def test_no_other_temperature_has_a_lower_cross_entropy() -> None:
    logits, labels = promises(1.7, count=300)
    found = fit_temperature(logits, labels)
    losses = [float(F.cross_entropy(logits.double() / (found * factor), labels)) for factor in (0.99, 1.0, 1.01)]
    assert losses[1] < min(losses[0], losses[2])


def test_calibrated_probabilities_keep_their_word() -> None:
    logits, labels = promises(3.0)
    before = reliability(logits.softmax(1), labels).ece
    after = reliability((logits / fit_temperature(logits, labels)).softmax(1), labels).ece
    assert before > 0.1
    assert after < 0.02


def test_temperature_stays_bounded_where_no_image_or_every_image_is_wrong() -> None:
    logits, labels = torch.eye(4), torch.arange(4)
    assert fit_temperature(logits, labels) == pytest.approx(LOWEST)
    assert fit_temperature(logits, labels.roll(1)) == pytest.approx(HIGHEST)


def test_temperature_of_logits_that_say_nothing_is_a_number() -> None:
    assert LOWEST <= fit_temperature(torch.zeros(3, 2), torch.tensor([0, 1, 1])) <= HIGHEST


def test_huge_logits_do_not_overflow() -> None:
    logits, labels = promises(1.0, count=500)
    assert fit_temperature(logits + 1e6, labels) == pytest.approx(fit_temperature(logits, labels), rel=0.05)


@pytest.mark.parametrize("logits", [torch.empty(0, 3), torch.tensor([[1.0, float("nan")]])], ids=["none", "nan"])
def test_what_no_temperature_can_be_fitted_to_is_refused(logits: torch.Tensor) -> None:
    with pytest.raises(InputError, match="at least one image, and logits that are finite"):
        fit_temperature(logits, torch.zeros(len(logits), dtype=torch.int64))


@pytest.mark.parametrize("bins", [10, 15])
def test_calibration_error_is_that_of_torchmetrics(bins: int) -> None:
    logits, labels = promises(2.0, count=2000)
    probabilities = logits.softmax(1)
    found = reliability(probabilities, labels, bins)
    expected = multiclass_calibration_error(probabilities, labels, num_classes=5, n_bins=bins, norm="l1")
    assert found.ece == pytest.approx(float(expected), abs=1e-6)
    assert sum(found.counts) == 2000


def test_bins_can_be_counted_by_hand() -> None:
    probabilities = torch.tensor([[1.0, 0.0], [0.4, 0.6], [0.7, 0.3], [0.72, 0.28]])
    found = reliability(probabilities, torch.tensor([0, 1, 1, 0]), bins=4)
    assert found.counts == (0, 0, 3, 1)
    assert found.confidence == pytest.approx((0, 0, (0.6 + 0.7 + 0.72) / 3, 1))
    assert found.accuracy == pytest.approx((0, 0, 2 / 3, 1))
