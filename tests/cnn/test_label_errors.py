"""Label errors: values counted by hand, planted errors, and probabilities that are mapped from a file."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict

from cnn.evaluation import label_errors
from cnn.evaluation.label_errors import LabelErrors, find_label_errors

A, B, C = range(3)
LABELS = np.array([A, A, A, B, B, B, A, B])
PROBABILITIES = np.array(
    [
        [0.90, 0.10, 0.00],
        [0.70, 0.30, 0.00],
        [0.20, 0.80, 0.00],  # surely B
        [0.10, 0.90, 0.00],
        [0.30, 0.70, 0.00],
        [0.60, 0.40, 0.00],  # surely A
        [0.00, 0.35, 0.65],  # counts for none: no image is labelled C, so none tells when a C is sure
        [0.45, 0.55, 0.00],  # counts for A, and B is still more probable
    ],
    dtype=np.float32,
)


def planted(share: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the labels of scikit-learn's digits, and the same with a share of wrong ones."""
    truth, random = load_digits().target.astype(np.int64), np.random.default_rng(0)
    wrong = random.random(len(truth)) < share
    return truth, np.where(wrong, (truth + random.integers(1, 10, len(truth))) % 10, truth)


def not_seen(labels: NDArray[np.int64]) -> NDArray[np.float32]:
    """Returns probabilities of the digits, each by a network of one layer that was fitted to others."""
    pixels, model = load_digits().data / 16, LogisticRegression(max_iter=300)
    return np.asarray(cross_val_predict(model, pixels, labels, cv=5, method="predict_proba"), dtype=np.float32)


def test_values_are_those_counted_by_hand() -> None:
    found = find_label_errors(PROBABILITIES, LABELS)
    assert found.thresholds == pytest.approx([(0.9 + 0.7 + 0.2 + 0) / 4, (0.9 + 0.7 + 0.4 + 0.55) / 4, np.inf])
    assert found.joint.tolist() == [[2, 1, 0], [2, 2, 0], [0, 0, 0]]
    assert found.index.tolist() == [2, 5]
    assert (found.given.tolist(), found.suggested.tolist()) == ([A, B], [B, A])
    assert found.given_probability == pytest.approx([0.2, 0.4])
    assert found.suggested_probability == pytest.approx([0.8, 0.6])
    assert found.score == pytest.approx([0.8, 0.6])


def test_most_probable_errors_come_first_and_equal_ones_in_their_order() -> None:
    repeated = find_label_errors(np.concatenate([PROBABILITIES] * 2), np.concatenate([LABELS] * 2))
    assert repeated.index.tolist() == [2, 10, 5, 13]


def test_image_of_several_sure_classes_counts_for_the_most_probable_one() -> None:
    probabilities = np.array([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.3, 0.4, 0.3], [0.3, 0.45, 0.25]], dtype=np.float32)
    found = find_label_errors(probabilities, np.array([A, C, B, B]))  # thresholds 0.5, 0.425, 0.5
    assert found.joint.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    relabelled = find_label_errors(probabilities, np.array([C, A, B, B]))  # 0.2, 0.425, 0.2
    assert relabelled.joint.tolist() == [[0, 0, 1], [1, 1, 0], [1, 0, 0]]
    assert relabelled.index.tolist() == [0, 1] and relabelled.suggested.tolist() == [A, C]


def test_labels_that_are_right_or_undecided_are_not_listed() -> None:
    for probabilities in (np.eye(3)[[A, B, C, A]], np.full((4, 3), 1 / 3)):
        found = find_label_errors(probabilities.astype(np.float32), np.array([A, B, C, A]))
        assert len(found.index) == len(found.score) == 0


def test_planted_errors_are_found_with_their_true_labels() -> None:
    truth, labels = planted(0.03)
    found = find_label_errors(not_seen(labels), labels)
    wrong = labels != truth
    hits = wrong[found.index]
    assert hits.sum() >= 0.7 * wrong.sum()
    assert hits.mean() >= 0.7
    assert hits[:20].all()
    assert (found.suggested == truth[found.index])[hits].mean() >= 0.95


def test_probabilities_mapped_from_a_file_and_read_in_blocks_give_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, labels = planted(0.1)
    probabilities = not_seen(labels)
    whole = find_label_errors(probabilities, labels)
    np.save(tmp_path / "probabilities.npy", probabilities)
    monkeypatch.setattr(label_errors, "BLOCK_VALUES", 370)
    by_blocks = find_label_errors(np.load(tmp_path / "probabilities.npy", mmap_mode="r"), labels)
    assert len(whole.index) > 100
    for field in LabelErrors.__dataclass_fields__:
        ours, theirs = getattr(by_blocks, field), getattr(whole, field)
        assert np.allclose(ours, theirs, rtol=1e-12, atol=0) if field == "thresholds" else np.array_equal(ours, theirs)
