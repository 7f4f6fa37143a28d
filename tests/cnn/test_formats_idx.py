"""IDX files: what is read, and what is refused."""

import struct
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from cnn.data.splits import TEST, TRAIN
from cnn.errors import InputError
from cnn.formats import open_source


def write_idx(path: Path, array: np.ndarray) -> Path:
    header = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())
    return path


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    digits = load_digits()
    images, labels = digits.images * 15, digits.target
    return {
        name: write_idx(tmp_path / str(number), array)  # as in the cache: the local name says nothing
        for number, (name, array) in enumerate(
            {
                "train-images-idx3-ubyte": images[:1500],
                "train-labels-idx1-ubyte": labels[:1500],
                "t10k-images-idx3-ubyte": images[1500:],
                "t10k-labels-idx1-ubyte": labels[1500:],
            }.items()
        )
    }


def test_images_labels_and_official_splits_come_out_as_written(files: dict[str, Path]) -> None:
    source = open_source("idx", files)
    blocks = list(source.blocks())
    digits = load_digits()
    assert len(source) == 1797
    assert (np.concatenate([block.images for block in blocks])[:, 0] == digits.images * 15).all()
    assert (np.concatenate([block.labels for block in blocks]) == digits.target).all()
    assert np.concatenate([block.splits for block in blocks]).tolist() == [TRAIN] * 1500 + [TEST] * 297
    assert source.classes == tuple("0123456789")


def test_class_names_can_be_given(files: dict[str, Path]) -> None:
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    assert open_source("idx", files, names).classes == tuple(names)
    with pytest.raises(InputError, match="label 9 has no name"):
        open_source("idx", files, names[:9])


def test_labels_that_do_not_start_at_zero_become_classes(files: dict[str, Path]) -> None:
    for part in ("train", "t10k"):
        path = files[f"{part}-labels-idx1-ubyte"]
        write_idx(path, np.frombuffer(path.read_bytes()[8:], dtype=np.uint8) + 1)
    source = open_source("idx", files)
    assert source.classes == tuple(map(str, range(1, 11)))
    assert next(iter(source.blocks())).labels[:3].tolist() == [0, 1, 2]


@pytest.mark.parametrize("change", [-1, +5])
def test_a_file_of_the_wrong_length_is_refused_with_both_lengths(files: dict[str, Path], change: int) -> None:
    path = files["train-images-idx3-ubyte"]
    content = path.read_bytes()
    path.write_bytes(content[:change] if change < 0 else content + bytes(change))
    expected = 16 + 1500 * 64
    with pytest.raises(InputError) as refusal:
        open_source("idx", files)
    message = str(refusal.value)
    assert "train-images-idx3-ubyte" in message and f"expected {expected} bytes" in message
    assert f"found {expected + change}" in message and "\n" not in message


def test_a_file_cut_inside_its_header_is_refused(files: dict[str, Path]) -> None:
    files["t10k-labels-idx1-ubyte"].write_bytes(b"\0\0\x08")
    with pytest.raises(InputError, match="t10k-labels-idx1-ubyte is cut short"):
        open_source("idx", files)


def test_swapped_and_foreign_files_are_refused(files: dict[str, Path]) -> None:
    swapped = dict(zip(files, reversed(files.values()), strict=True))
    with pytest.raises(InputError, match="not the IDX file expected"):
        open_source("idx", swapped)
    with pytest.raises(InputError, match="no pair of IDX files"):
        open_source("idx", {"readme": files["train-images-idx3-ubyte"]})


def test_missing_or_fewer_labels_are_refused(files: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="train-images-idx3-ubyte has no matching labels file"):
        open_source("idx", {name: path for name, path in files.items() if name != "train-labels-idx1-ubyte"})
    write_idx(files["train-labels-idx1-ubyte"], np.zeros(1499))
    with pytest.raises(InputError, match=r"1500 images but .* 1499 labels"):
        open_source("idx", files)
