"""CIFAR's binary archives are read as a stream; its pickles are not."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from cnn.data.splits import TEST, TRAIN
from cnn.errors import InputError
from cnn.formats import open_source

RANDOM = np.random.default_rng(0)


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def records(labels: list[list[int]]) -> tuple[np.ndarray, bytes]:
    """Random images and their records, each with its label bytes first."""
    pixels = RANDOM.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
    return pixels, np.concatenate([np.array(labels, dtype=np.uint8), pixels], axis=1).tobytes()


@pytest.mark.parametrize("mode", ["w:gz", "w"])
def test_cifar10_batches_are_read_from_the_stream(tmp_path: Path, mode: str) -> None:
    first, first_bytes = records([[0], [1]])
    second, second_bytes = records([[2]] * 1500)  # more than a block
    test, test_bytes = records([[1]])
    members = {
        "cifar-10-batches-bin/data_batch_1.bin": first_bytes,
        "cifar-10-batches-bin/batches.meta.txt": b"airplane\nautomobile\nbird\n\n",
        "cifar-10-batches-bin/data_batch_2.bin": second_bytes,
        "cifar-10-batches-bin/readme.html": b"<html>",
        "cifar-10-batches-bin/test_batch.bin": test_bytes,
    }
    source = open_source("cifar", {"cifar-10-binary.tar.gz": write_tar(tmp_path / "digest", members, mode)})
    for _ in range(2):  # each pass gives the same
        blocks = list(source.blocks())
        images = np.concatenate([block.images for block in blocks])
        assert (images.reshape(-1, 3072) == np.concatenate([first, second, test])).all()
        assert np.concatenate([block.labels for block in blocks]).tolist() == [0, 1] + [2] * 1500 + [1]
        assert np.concatenate([block.splits for block in blocks]).tolist() == [TRAIN] * 1502 + [TEST]
    assert source.classes == ("airplane", "automobile", "bird")
    assert len(source) == 1503


def test_cifar100_uses_the_fine_labels(tmp_path: Path) -> None:
    _, train = records([[0, 2], [1, 0]])
    _, test = records([[0, 1]])
    members = {
        "c/train.bin": train,
        "c/test.bin": test,
        "c/fine_label_names.txt": b"apple\nbear\ncup\n",
        "c/coarse_label_names.txt": b"fruit\nmammal\n",
    }
    source = open_source("cifar", {"cifar-100-binary.tar.gz": write_tar(tmp_path / "digest", members)})
    assert source.classes == ("apple", "bear", "cup")
    assert np.concatenate([block.labels for block in source.blocks()]).tolist() == [2, 0, 1]


def test_the_python_version_is_refused_and_never_opened(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "digest", {"cifar-10-batches-py/batches.meta": b"\x80\x02}.", "c/data_batch_1": b"x"})
    with pytest.raises(InputError, match="pickle; fetch the binary version"):
        open_source("cifar", {"cifar-10-python.tar.gz": path})


@pytest.mark.parametrize("kept", [0.3, 0.97])
def test_an_archive_that_is_cut_short_is_refused(tmp_path: Path, kept: float) -> None:
    _, data = records([[0]] * 200)
    members = {"c/data_batch_1.bin": data, "c/batches.meta.txt": b"a b", "c/test_batch.bin": data}
    path = write_tar(tmp_path / "digest", members)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(InputError, match=r"cifar-10-binary\.tar\.gz is not a whole tar archive"):
        open_source("cifar", {"cifar-10-binary.tar.gz": path})


def test_batches_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    _, data = records([[0], [9]])
    members = {"c/data_batch_1.bin": data, "c/batches.meta.txt": b"a b", "c/test_batch.bin": data[:-1]}
    with pytest.raises(InputError, match=r"test_batch\.bin has 6145 bytes"):
        open_source("cifar", {"cifar": write_tar(tmp_path / "digest", members)})
    source = open_source("cifar", {"cifar": write_tar(tmp_path / "digest", members | {"c/test_batch.bin": data})})
    with pytest.raises(InputError, match="label 9, which has no name"):
        list(source.blocks())
    del members["c/test_batch.bin"]
    with pytest.raises(InputError, match="lacks the training or test batches"):
        open_source("cifar", {"cifar": write_tar(tmp_path / "digest", members)})
