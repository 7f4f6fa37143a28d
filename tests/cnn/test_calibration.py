"""Temperatures and calibration errors, against a search and against torchmetrics."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

from cnn.errors import InputError
from cnn.evaluation.calibration import MAX_TEMPERATURE, MIN_TEMPERATURE, fit_temperature, reliability, temperature_note
from tests.cnn.conftest import Packed


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
    logits, labels = promises(1.7, count=20_000)
    found = fit_temperature(logits, labels)
    losses = [float(F.cross_entropy(logits.double() / (found * factor), labels)) for factor in (0.99, 1.0, 1.01)]
    assert losses[1] < min(losses[0], losses[2])


@pytest.mark.long
@pytest.mark.parametrize("count", [30, 100, 300, 1000, 10_000])
def test_other_images_do_not_suffer_from_a_temperature(count: int, one_thread: None) -> None:
    """Validation splits that are too sure, too modest or just right; some nearly without a mistake."""
    generator = torch.Generator().manual_seed(0)
    splits = 20 if count < 1000 else 1

    def drawn(count: int, classes: int, scale: float, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        honest = scale * torch.randn(count, classes, generator=generator, dtype=torch.float64)
        return honest * temperature, torch.multinomial(honest.softmax(1), 1, generator=generator).squeeze(1)

    for kind in itertools.product((2, 10), (3.0, 20.0), (0.6, 1.0, 1.5, 3.0)):
        logits, labels = drawn(3000, *kind)
        before = F.cross_entropy(logits, labels)
        found = (fit_temperature(*drawn(count, *kind)) for _ in range(splits))
        changes = [float(F.cross_entropy(logits / each, labels) - before) for each in found]
        assert max(changes) < 0.02
        assert sum(changes) / splits < 0.001
        if kind[1:] == (3, 3) and count >= 300:
            assert max(changes) < -0.01  # and where it helps, it does


@pytest.mark.parametrize("count", [30, 100, 300])
def test_digits_do_not_suffer_from_a_temperature(digits: Packed, one_thread: None, count: int) -> None:
    """Real images: a classifier that is too modest, fitted on few or with all of them right, which once meant 0.05."""
    images, labels = digits.split("train").slice(0, 2000)
    pixels = F.normalize(images.flatten(1).double())
    centres = torch.stack([pixels[:300][labels[:300] == label].mean(0) for label in range(10)])
    generator = torch.Generator().manual_seed(0)
    for sureness in (10, 40, 160):
        logits, truth = sureness * pixels[300:] @ centres.T, labels[300:]
        before = float(F.cross_entropy(logits, truth))
        for _ in range(10):
            drawn = torch.randperm(len(truth), generator=generator)[:count]
            right = drawn[logits[drawn].argmax(1) == truth[drawn]]
            assert fit_temperature(logits[right], truth[right]) == 1
            found = fit_temperature(logits[drawn], truth[drawn])
            assert F.cross_entropy(logits / found, truth) < before + 0.01


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads of PyTorch that wait for each other on a busy machine would take minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_calibrated_probabilities_keep_their_word() -> None:
    logits, labels = promises(3.0)
    before = reliability(logits.softmax(1), labels).ece
    after = reliability((logits / fit_temperature(logits, labels)).softmax(1), labels).ece
    assert before > 0.1
    assert after < 0.02


def test_few_images_move_the_temperature_little() -> None:
    logits, labels = torch.eye(4), torch.arange(4)
    assert fit_temperature(logits, labels) == 1
    assert 1 <= fit_temperature(logits, labels.roll(1)) < 1.25
    assert fit_temperature(logits[:1], labels[:1]) == 1


def test_temperature_stays_bounded_and_a_reader_is_told() -> None:
    logits, labels = 100 * torch.eye(4).repeat(1000, 1), torch.arange(4).repeat(1000)
    found = fit_temperature(logits, labels.roll(1))
    assert found == MAX_TEMPERATURE
    assert "at its limit of 20" in temperature_note(found)
    assert "stay as trained" in temperature_note(1.0)
    assert temperature_note(1.3) == ""


def test_temperature_of_logits_that_say_nothing_is_a_number() -> None:
    assert MIN_TEMPERATURE <= fit_temperature(torch.zeros(3, 2), torch.tensor([0, 1, 1])) <= MAX_TEMPERATURE


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
