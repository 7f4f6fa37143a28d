"""A streamed split gives the same images as a mapped one, ahead of their use, and raises the errors of its shards."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cnn.config.training import TrainConfig
from cnn.data.manifest import Shard
from cnn.data.read_ahead import read_ahead
from cnn.data.shard_writer import shard_path
from cnn.data.streamed_split import StreamedSplit
from cnn.errors import InputError, NotAvailable
from cnn.training.order import Order
from tests.cnn.conftest import FewFiles, Packed, streamed, write_encoded


@pytest.fixture
def split(many_shards: Packed, tmp_path: Path) -> StreamedSplit:
    return streamed(many_shards, "train", tmp_path / "here")


def equal(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)) and ours[0].is_contiguous()


def test_it_reads_what_the_mapped_split_reads(split: StreamedSplit, many_shards: Packed) -> None:
    mapped = many_shards.split("train")
    assert (len(split), split.shape) == (len(mapped), mapped.shape)
    for index in (
        torch.randperm(len(split)),
        torch.tensor([5, 5, 1371, 0, 700, 5]),
        torch.tensor([], dtype=torch.int64),
    ):
        assert equal(split.gather(index), mapped.gather(index))
    for start, stop in ((0, 10), (30, 400), (1300, 5000), (1372, 1400), (7, 3)):
        assert equal(split.slice(start, stop), mapped.slice(start, stop))
    orders = [torch.randperm(1372)[:1344].view(-1, 32) for _ in range(2)]
    for ours, theirs in zip(split.batches(orders), mapped.batches(orders), strict=True):
        assert equal(ours, theirs)
    assert torch.equal(split.labels, mapped.labels)


@pytest.mark.parametrize(("size", "first", "every"), [(250, 0, 1), (250, 1, 2), (10, 3, 4), (2000, 0, 1), (2000, 1, 4)])
def test_blocks_are_those_of_the_mapped_split(
    split: StreamedSplit, many_shards: Packed, size: int, first: int, every: int
) -> None:
    mapped = many_shards.split("train")
    ours, theirs = (list(each.blocks(size, first=first, every=every)) for each in (split, mapped))
    assert len(ours) == len(theirs) == len(range(first * size, 1372, every * size))
    assert all(equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_labels_cost_no_second_pass_after_reading_block_by_block(many_shards: Packed, tmp_path: Path) -> None:
    fetch = FewFiles(many_shards, tmp_path, most=100)
    split = StreamedSplit(many_shards.manifest.splits["train"].shards, (1, 8, 8), fetch)
    for _ in split.blocks(100):
        pass
    for file in tmp_path.iterdir():
        file.unlink()
    fetch.fetched.clear()
    assert torch.equal(split.labels, many_shards.split("train").labels)
    assert fetch.fetched == []


@pytest.mark.parametrize("index", [1372, -1, 10_000])
def test_an_index_out_of_range_is_an_error(split: StreamedSplit, index: int) -> None:
    with pytest.raises(IndexError):
        split.gather(torch.tensor([0, index, 1]))


def test_a_windowed_epoch_fetches_the_shards_of_its_lanes_once_though_few_fit(
    many_shards: Packed, tmp_path: Path
) -> None:
    info = many_shards.manifest.splits["train"]
    fetch = FewFiles(many_shards, tmp_path, most=8)
    split = StreamedSplit(info.shards, (1, 8, 8), fetch, ahead=2 * info.shards[0].bytes)
    order = Order(TrainConfig(batch_size=64, lanes=4, shuffle_window=300), info).epoch(0, range(1, 2))
    assert sum(len(images) for images, _ in split.batches([order.flatten(0, 1)])) == order.numel()
    assert len(fetch.fetched) == len(set(fetch.fetched))
    assert len(fetch.fetched) <= len(info.shards) / 4 + 2


def test_shards_are_fetched_no_further_ahead_than_asked(many_shards: Packed, tmp_path: Path) -> None:
    info = many_shards.manifest.splits["train"]
    fetch = FewFiles(many_shards, tmp_path, most=100)
    split = StreamedSplit(info.shards, (1, 8, 8), fetch, ahead=3 * info.shards[0].bytes)
    blocks = split._blocks(37, 0, 1)  # without the thread that makes blocks ahead
    for row in range(5):
        next(blocks)
        deadline = time.monotonic() + 10
        while len(fetch.fetched) < row + 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert set(fetch.fetched) == {shard.sha256 for shard in info.shards[: row + 4]}
    blocks.close()


def test_trouble_with_a_shard_is_told_where_the_shard_is_needed(many_shards: Packed, tmp_path: Path) -> None:
    shards = list(many_shards.manifest.splits["train"].shards)
    copy = FewFiles(many_shards, tmp_path, most=100)

    def fetch(shard: Shard) -> Path:
        if shard == shards[3]:
            raise OSError(f"{shard.sha256} cannot be reached")
        path = copy(shard)
        if shard == shards[5]:
            path.write_bytes(path.read_bytes()[:-10])
        return path

    split = StreamedSplit(shards, (1, 8, 8), fetch)
    done = 0
    with pytest.raises(OSError, match=f"{shards[3].sha256} cannot be reached"):
        for images, _ in split.blocks(10):
            done += len(images)
    assert done == 110
    with pytest.raises(InputError, match=f"{shards[5].sha256} is not a whole shard"):
        split.gather(torch.tensor([5 * 37]))
    larger = StreamedSplit(shards, (1, 9, 9), copy)
    with pytest.raises(InputError, match=r"its images are \(1, 8, 8\), the manifest says \(1, 9, 9\)"):
        larger.gather(torch.tensor([0]))
    longer = StreamedSplit([shards[0].model_copy(update={"count": 38})], (1, 8, 8), copy)
    with pytest.raises(InputError, match="it has 37 images, the manifest says 38"):
        longer.gather(torch.tensor([0]))
    with pytest.raises(InputError, match="at least one shard"):
        StreamedSplit([], (1, 8, 8), copy)


def test_a_shard_that_leaves_between_fetching_and_opening_is_fetched_again(many_shards: Packed, tmp_path: Path) -> None:
    copy, left = FewFiles(many_shards, tmp_path, most=100), []

    def fetch(shard: Shard) -> Path:
        path = copy(shard)
        if not left:
            left.append(path)
            path.unlink()
        return path

    split = StreamedSplit(many_shards.manifest.splits["train"].shards, (1, 8, 8), fetch)
    assert equal(split.gather(torch.tensor([1, 2])), many_shards.split("train").gather(torch.tensor([1, 2])))


def test_a_shard_that_always_leaves_before_it_is_opened_is_no_mistake_of_the_users(
    many_shards: Packed, tmp_path: Path
) -> None:
    split = StreamedSplit(many_shards.manifest.splits["train"].shards, (1, 8, 8), lambda _: tmp_path / "gone")
    with pytest.raises(NotAvailable, match=r"raise CONVOY_CACHE_BYTES$"):
        split.gather(torch.tensor([1]))


def test_a_shard_that_leaves_while_it_is_opened_is_read_all_the_same(
    many_shards: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leaves(*arguments: str, **options: str) -> object:
        for file in tmp_path.iterdir():
            file.unlink()
        return safe_open(*arguments, **options)

    monkeypatch.setattr("cnn.data.shard_reader.safe_open", leaves)
    split = streamed(many_shards, "train", tmp_path)
    assert equal(split.gather(torch.tensor([1, 2])), many_shards.split("train").gather(torch.tensor([1, 2])))
    assert split._fetch.fetched == [many_shards.manifest.splits["train"].shards[0].sha256]  # once


def test_encoded_images_are_decoded_alike_however_they_are_read(
    encoded: Packed, digits: Packed, tmp_path: Path
) -> None:
    split = streamed(encoded, "train", tmp_path)
    whole, labels = split.slice(0, len(split))
    assert torch.equal(labels, digits.split("train").labels)
    original = digits.split("train").slice(0, len(split))[0]
    assert float((whole.float() - original.float()).abs().mean()) < 12  # JPEG is not exact
    index = torch.randperm(len(split))[:1280].view(-1, 64)
    with torch.inference_mode():
        assert torch.equal(next(iter(split.blocks(len(split))))[0], whole)
    for row, (images, found) in zip(index, split.batches([index]), strict=True):
        assert torch.equal(images, whole[row]) and torch.equal(found, labels[row])


def test_colour_images_as_webp_and_as_jpeg(tmp_path: Path) -> None:
    images = torch.randint(256, (4, 3, 1, 1)).expand(4, 3, 16, 16).to(torch.uint8).contiguous()
    for kind in ("jpeg", "webp"):
        shard = write_encoded(tmp_path, images, torch.arange(4), kind)
        split = StreamedSplit([shard], (3, 16, 16), lambda shard: shard_path(tmp_path, shard.sha256), encoding=kind)
        found, labels = split.gather(torch.tensor([3, 0]))
        assert labels.tolist() == [3, 0]
        assert int((found.int() - images[[3, 0]].int()).abs().max()) <= 8


def test_an_image_that_cannot_be_decoded_or_has_another_size_is_named(encoded: Packed, tmp_path: Path) -> None:
    def one(images: Tensor, break_it: bool = False) -> StreamedSplit:
        shard = write_encoded(tmp_path, images, torch.zeros(len(images), dtype=torch.int64), "jpeg")
        path = shard_path(tmp_path, shard.sha256)
        if break_it:
            data = bytearray(path.read_bytes())
            start = data.index(b"\xff\xd8", data.index(b"\xff\xd8") + 2)  # of the second image
            data[start : start + 2] = b"xx"
            path.write_bytes(data)
        return StreamedSplit([shard], (1, 8, 8), lambda _: path, encoding="jpeg")

    images = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(InputError, match=r"\.safetensors: its image 1 cannot be decoded"):
        one(images, break_it=True).gather(torch.arange(3))
    with pytest.raises(InputError, match=r"its image 0 is \(1, 9, 9\), the manifest says \(1, 8, 8\)"):
        one(torch.zeros(2, 1, 9, 9, dtype=torch.uint8)).gather(torch.arange(2))
    bad = tmp_path / "bad.safetensors"
    tensors = {"encoded": torch.zeros(9, dtype=torch.uint8), "labels": torch.zeros(2, dtype=torch.int64)}
    save_file(tensors | {"offsets": torch.tensor([0, 4, 8])}, bad)
    split = StreamedSplit(encoded.manifest.splits["val"].shards, (1, 8, 8), lambda _: bad, encoding="jpeg")
    with pytest.raises(InputError, match=r"bad\.safetensors is not a shard of encoded images"):
        split.gather(torch.tensor([0]))


def test_items_are_made_ahead_up_to_the_depth_and_the_thread_ends_with_the_consumer() -> None:
    made: list[int] = []
    closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            for item in range(100):
                made.append(item)
                yield item
        finally:
            closed.set()

    ahead = read_ahead(items(), 3)  # type: ignore[arg-type]
    assert [next(ahead), next(ahead)] == [0, 1]
    deadline = time.monotonic() + 10
    while len(made) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 6  # two taken, three waiting, one more in hand
    ahead.close()
    assert closed.is_set()
    assert not [thread for thread in threading.enumerate() if thread.name == "read-ahead"]
    assert list(read_ahead((item for item in range(5)), 2)) == list(range(5))


def test_an_error_comes_where_its_item_would_have_come() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("the second")

    ahead = read_ahead(items(), 5)  # type: ignore[arg-type]
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="the second"):
        next(ahead)
