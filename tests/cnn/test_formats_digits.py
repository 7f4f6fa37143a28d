"""scikit-learn's digits file."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
from sklearn.datasets import load_digits

from cnn.data.splits import UNDECIDED
from cnn.errors import InputError
from cnn.formats import open_source


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    packed = Path(sklearn.datasets.__path__[0]) / "data" / "digits.csv.gz"
    path = tmp_path / "digest"
    path.write_bytes(gzip.decompress(packed.read_bytes()))
    return path


def test_all_images_are_scaled_to_the_full_range(csv: Path) -> None:
    source = open_source("digits", {"digits.csv": csv})
    (block,) = source.blocks()
    digits = load_digits()
    assert (block.images[:, 0] == np.round(digits.images * 255 / 16)).all()
    assert (block.labels == digits.target).all()
    assert (block.splits == UNDECIDED).all()
    assert source.classes == tuple("0123456789")
    assert len(source) == 1797


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda text: text[:-20] + "\n", "not the digits CSV"),
        (lambda text: text.replace("0", "x", 1), "not the digits CSV"),
        (lambda text: text.replace("0", "17", 1), r"outside 0\.\.16"),
        (lambda text: text.replace("0", "-1", 1), r"outside 0\.\.16"),
        (lambda text: "1,2,3\n", "expected lines of 65 numbers"),
        (lambda text: "", "expected lines of 65 numbers"),
    ],
)
def test_a_damaged_file_is_refused(csv: Path, damage, complaint: str) -> None:  # type: ignore[no-untyped-def]
    csv.write_text(damage(csv.read_text()))
    with pytest.raises(InputError, match=complaint):
        open_source("digits", {"digits.csv": csv})
