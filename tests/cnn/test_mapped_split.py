"""Reading packed splits: memory-mapped, vectorised, and honest about damage."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from cnn.data.device_batches import resident_batches
from cnn.data.mapped_split import MappedSplit
from cnn.data.shard_writer import ShardWriter, shard_path
from cnn.errors import InputError

IMAGES = torch.from_numpy((load_digits().images * 15).astype(np.uint8)).unsqueeze(1)
LABELS = torch.from_numpy(load_digits().target.astype(np.int64))


def write(folder: Path, *, per_shard: int) -> Sequence[Path]:
    writer = ShardWriter(folder, (1, 8, 8), shard_bytes=per_shard * 64)
    writer.add(IMAGES.numpy(), LABELS.numpy())
    return [shard_path(folder, shard.sha256) for shard in writer.close()]


@pytest.fixture(params=[2000, 500, 7], ids=["one shard", "some shards", "many shards"])
def split(request: pytest.FixtureRequest, tmp_path: Path) -> MappedSplit:
    return MappedSplit(write(tmp_path, per_shard=request.param))


def test_a_gather_gives_images_and_labels_in_the_order_asked_for(split: MappedSplit) -> None:
    assert len(split) == 1797
    assert split.shape == (1, 8, 8)
    assert torch.equal(split.labels, LABELS)
    for index in (
        torch.randperm(1797),
        torch.tensor([5, 5, 1796, 0, 700, 5]),
        torch.tensor([], dtype=torch.int64),
    ):
        images, labels = split.gather(index)
        assert torch.equal(images, IMAGES[index])
        assert torch.equal(labels, LABELS[index])
        assert images.is_contiguous()


@pytest.mark.parametrize("index", [1797, -1, 10_000])
def test_an_index_out_of_range_is_an_error(split: MappedSplit, index: int) -> None:
    with pytest.raises(IndexError):
        split.gather(torch.tensor([0, index, 1]))


def test_slices_cover_the_split_in_order(split: MappedSplit) -> None:
    parts = [split.slice(start, start + 250) for start in range(0, len(split), 250)]
    assert torch.equal(torch.cat([images for images, _ in parts]), IMAGES)
    assert torch.equal(torch.cat([labels for _, labels in parts]), LABELS)
    images, labels = split.slice(1797, 1900)
    assert images.shape == (0, 1, 8, 8) and labels.shape == (0,)


def test_a_split_held_on_a_device_gives_the_same_batches(split: MappedSplit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cnn.data.device_batches.BLOCK", 250)
    orders = [torch.randperm(1797)[:1792].view(7, 256) for _ in range(2)]
    resident = resident_batches(split, orders, torch.device("cpu"))
    for (images, labels), (theirs, their_labels) in zip(resident, split.batches(orders), strict=True):
        assert torch.equal(images, theirs) and torch.equal(labels, their_labels)
    assert split.nbytes == 1797 * 64


def test_images_are_mapped_and_not_copied(tmp_path: Path) -> None:
    split = MappedSplit(write(tmp_path, per_shard=2000))
    images, _ = split.slice(100, 200)
    (mapping,) = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    low, high = (int(end, 16) for end in mapping[0].split("-"))
    assert low <= images.data_ptr() < high
    assert images.data_ptr() == split.slice(100, 300)[0].data_ptr()


def test_opening_a_large_split_takes_no_memory_for_its_images(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    save_file(
        {
            "images": torch.zeros(4096, 1, 128, 128, dtype=torch.uint8),
            "labels": torch.zeros(4096, dtype=torch.int64),
        },
        path,
    )

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    split = MappedSplit([path])
    split.gather(torch.arange(0, 4096, 512))
    assert resident() - before < path.stat().st_size / 4


def test_damaged_and_foreign_files_are_refused_by_name(tmp_path: Path) -> None:
    (path,) = write(tmp_path, per_shard=2000)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"cut\.safetensors is not a whole shard"):
        MappedSplit([cut])
    with pytest.raises(InputError, match=r"gone\.safetensors is not a whole shard"):
        MappedSplit([tmp_path / "gone.safetensors"])
    foreign = tmp_path / "foreign.safetensors"
    save_file({"images": torch.zeros(3, 1, 8, 8), "labels": torch.zeros(3, dtype=torch.int64)}, foreign)
    with pytest.raises(InputError, match=r"foreign\.safetensors is not a shard: expected"):
        MappedSplit([foreign])
    save_file({"weight": torch.zeros(3)}, foreign)
    with pytest.raises(InputError, match=r"foreign\.safetensors is not a whole shard"):
        MappedSplit([foreign])
    larger = tmp_path / "larger.safetensors"
    save_file(
        {"images": torch.zeros(3, 1, 9, 9, dtype=torch.uint8), "labels": torch.zeros(3, dtype=torch.int64)},
        larger,
    )
    with pytest.raises(InputError, match=r"larger\.safetensors: its images are \(1, 9, 9\)"):
        MappedSplit([path, larger])
    with pytest.raises(InputError, match="at least one shard"):
        MappedSplit([])
