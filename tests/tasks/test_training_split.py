"""The training split with a small cache: the same weights, within the limit, or a clear refusal."""

import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from cnn.config.training import TrainConfig
from cnn.data.manifest import Manifest, SplitInfo
from cnn.data.mapped_split import MappedSplit
from cnn.data.shard_writer import ShardWriter, shard_path
from cnn.data.streamed_split import StreamedSplit
from cnn.distributed.lanes import Exchange
from cnn.networks.weights import weights_sha256
from cnn.training.loop import fit
from cnn.training.reports import EpochReport, StepReport
from cnn.training.trainer import Trainer
from infra.errors import Outage, UsageError
from infra.machine.locks import locked
from infra.storage import bucket_layout
from infra.storage.cache import Cache
from infra.storage.object_store import ObjectStore
from infra.storage.s3_client import ObjectMissing
from tasks.data import dataset
from tasks.data.dataset import DatasetRef, is_complete, open_cache, open_split, shards_of
from tasks.data.training_split import bytes_at_a_time, open_training_split
from tasks.training.rank import PatientCache
from tests.cnn.conftest import Packed, digits, encoded, joined_group, many_shards  # noqa: F401  # fixtures
from tests.infra.test_cache import flip

CONFIG = TrainConfig.model_validate(
    {
        "model": "notes",
        "network": {"channels": [8], "hidden": [16]},
        "epochs": 2,
        "batch_size": 64,
        "augment": {"flip": False, "shift": 0},
        "shuffle_window": 160,
    }
)


@pytest.fixture
def stored(store: ObjectStore, many_shards: Packed) -> Manifest:  # noqa: F811
    return put(store, many_shards)


def put(store: ObjectStore, packed: Packed) -> Manifest:
    for shard in shards_of(packed.manifest):
        store.put_file(bucket_layout.shard(shard.sha256), shard_path(packed.folder, shard.sha256))
    store.put_bytes(bucket_layout.dataset_manifest(packed.manifest.version), packed.manifest.to_bytes())
    return packed.manifest


@pytest.fixture
def group() -> Iterator[tuple[torch.device, Exchange]]:
    with joined_group() as joined:
        yield joined


class Silent:
    def on_step(self, report: StepReport) -> None: ...

    def on_epoch(self, report: EpochReport) -> None: ...

    def after_step(self, trainer: Trainer, *, milestone: bool) -> None: ...


class DiskUse:
    """The largest size that a folder had at a time."""

    def __init__(self, folder: Path) -> None:
        self.files = 0
        self.all = 0
        """Returns the size in whole pages, including files that are removed but still mapped."""

        self._folder, self._done = folder, threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "DiskUse":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            with locked(self._folder / "locks" / "room"):  # nothing leaves while files are counted one by one
                files, mapped = self._now()
            self.files, self.all = max(self.files, files), max(self.all, files + mapped)

    def _now(self) -> tuple[int, int]:
        sizes: dict[int, int] = {}  # by inode, since an incoming file is renamed
        for path in self._folder.glob("??/*"):
            try:
                status = path.stat()
                sizes[status.st_ino] = status.st_size
            except FileNotFoundError:
                continue
        mapped = 0
        for line in Path("/proc/self/maps").read_text().splitlines():
            if str(self._folder) in line and line.endswith("(deleted)"):
                low, high = (int(end, 16) for end in line.split()[0].split("-"))
                mapped += high - low
        return sum(sizes.values()), mapped


def train(cache: Cache, manifest: Manifest, config: TrainConfig, group: tuple[torch.device, Exchange]) -> str:
    device, exchange = group
    trainer = Trainer(
        config,
        manifest=manifest,
        train_split=open_training_split(cache, manifest, config, 1),
        val_split=open_split(cache, manifest, "val"),
        device=device,
        exchange=exchange,
    )
    fit(trainer, Silent())
    return weights_sha256(trainer.weights())


@pytest.mark.long
def test_a_training_keeps_within_a_small_cache_and_gives_the_same_weights(
    store: ObjectStore, stored: Manifest, tmp_path: Path, group: tuple[torch.device, Exchange]
) -> None:
    everything = Cache(tmp_path / "everything", store)
    expected = train(everything, stored, CONFIG, group)
    total = sum(shard.bytes for shard in shards_of(stored))
    little = Cache(tmp_path / "little", store, limit=total // 2)
    with DiskUse(little.root) as use:
        assert train(little, stored, CONFIG, group) == expected
    assert 0 < use.files <= total // 2
    assert use.all <= total // 2


def test_encoded_shards_train_alike_from_a_small_cache(
    store: ObjectStore,
    encoded: Packed,  # noqa: F811
    tmp_path: Path,
    group: tuple[torch.device, Exchange],
) -> None:
    manifest = put(store, encoded)
    total = sum(shard.bytes for shard in shards_of(manifest))
    caches = [Cache(tmp_path / "all", store), Cache(tmp_path / "some", store, limit=int(total * 0.7))]
    config = CONFIG.model_copy(update={"epochs": 1})
    assert len({train(cache, manifest, config, group) for cache in caches}) == 1


def test_a_small_split_is_mapped_and_a_large_or_windowed_one_is_streamed(
    store: ObjectStore, stored: Manifest, tmp_path: Path
) -> None:
    whole = CONFIG.model_copy(update={"shuffle_window": None})
    total = sum(shard.bytes for shard in shards_of(stored))
    roomy, tight = (Cache(tmp_path / "cache", store, limit=limit) for limit in (total, total - 1))
    assert isinstance(open_training_split(roomy, stored, whole, 1), MappedSplit)
    assert isinstance(open_training_split(roomy, stored, CONFIG, 1), StreamedSplit)
    assert isinstance(open_split(roomy, stored, "test"), MappedSplit)
    assert isinstance(open_split(tight, stored, "test"), StreamedSplit)
    ours, theirs = (open_split(cache, stored, "test").slice(0, 10**6) for cache in (roomy, tight))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_cache_that_may_not_hold_what_is_needed_at_a_time_is_refused_with_what_would_do(
    store: ObjectStore, stored: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = CONFIG.model_copy(update={"shuffle_window": None})
    total = sum(shard.bytes for shard in shards_of(stored))
    cache = Cache(tmp_path / "cache", store, limit=total * 3 // 5)
    with pytest.raises(UsageError, match=r"all images at a time takes .*; set shuffle_window to at most") as refusal:
        open_training_split(cache, stored, whole, 1)
    assert "\n" not in str(refusal.value)
    advised = int(str(refusal.value).split("at most ")[1].split(",")[0])
    open_training_split(cache, stored, CONFIG.model_copy(update={"shuffle_window": advised}), 1)
    with pytest.raises(UsageError, match=f"a window of {advised + 100} images"):
        open_training_split(cache, stored, CONFIG.model_copy(update={"shuffle_window": advised + 100}), 1)
    # A machine of one lane in four needs a quarter.
    open_training_split(cache, stored, CONFIG.model_copy(update={"shuffle_window": advised + 100}), 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UsageError):
        open_training_split(cache, stored, CONFIG.model_copy(update={"shuffle_window": advised + 100}), 4)
    tiny = Cache(tmp_path / "cache", store, limit=3 * stored.splits["train"].shards[0].bytes)
    with pytest.raises(UsageError, match=r"set CONVOY_CACHE_BYTES to that$"):
        open_training_split(tiny, stored, whole, 1)
    train_split = stored.splits["train"]
    needed = bytes_at_a_time(train_split, None, lanes=4, lanes_here=4)
    assert needed == sum(shard.bytes for shard in train_split.shards)


def test_a_shard_that_is_gone_from_the_bucket_is_named(
    store: ObjectStore, stored: Manifest, tmp_path: Path, group: tuple[torch.device, Exchange]
) -> None:
    gone = stored.splits["train"].shards[7]
    store.delete(bucket_layout.shard(gone.sha256))
    with pytest.raises(ObjectMissing, match=gone.sha256):
        train(Cache(tmp_path / "cache", store), stored, CONFIG, group)


def test_the_cache_keeps_to_the_setting(store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVOY_HOME", str(tmp_path))
    monkeypatch.setenv("CONVOY_CACHE_BYTES", "20MB")
    assert open_cache(store).limit == 20_000_000
    monkeypatch.delenv("CONVOY_CACHE_BYTES")
    assert (open_cache(store).limit or 0) > 20_000_000


@pytest.mark.parametrize("one_by_one", [0, 1000], ids=["listed", "asked one by one"])
def test_a_version_is_whole_if_all_its_shards_are_there_in_their_size(
    store: ObjectStore, stored: Manifest, one_by_one: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "MAX_HEAD_REQUESTS", one_by_one)
    version = DatasetRef(version=stored.version, name="digits").version
    assert is_complete(store, version)
    shard = shards_of(stored)[-1]
    content = store.get_bytes(bucket_layout.shard(shard.sha256))
    store.put_bytes(bucket_layout.shard(shard.sha256), content[:-1])
    assert not is_complete(store, version)
    store.delete(bucket_layout.shard(shard.sha256))
    assert not is_complete(store, version)


@pytest.mark.parametrize("window", [None, 160], ids=["mapped", "streamed"])
def test_a_flipped_byte_in_a_cached_shard_does_not_reach_the_reader(
    store: ObjectStore, stored: Manifest, tmp_path: Path, caplog: pytest.LogCaptureFixture, window: int | None
) -> None:
    config = CONFIG.model_copy(update={"shuffle_window": window})
    whole = open_training_split(Cache(tmp_path / "cache", store), stored, config, 1).slice(0, 10**6)[0].clone()
    shard = stored.splits["train"].shards[3]
    flip(Cache(tmp_path / "cache", store).path(shard.sha256))
    found = open_training_split(Cache(tmp_path / "cache", store), stored, config, 1).slice(0, 10**6)[0]
    assert torch.equal(found, whole)
    assert f"{shard.sha256} is damaged" in caplog.text


def inverted(packed: Packed, folder: Path) -> Packed:
    """The same images, dark for light, in shards of other content."""

    def packed_again(name: str, info: SplitInfo) -> SplitInfo:
        writer = ShardWriter(folder, (1, 8, 8), shard_bytes=37 * 64)
        images, labels = packed.split(name).slice(0, info.count)
        writer.add((255 - images).numpy(), labels.numpy())
        return info.model_copy(update={"shards": writer.close()})

    folder.mkdir()
    splits = {name: packed_again(name, info) for name, info in packed.manifest.splits.items()}
    return Packed(folder, packed.manifest.model_copy(update={"splits": splits}))


@pytest.mark.long
def test_trainings_that_together_need_more_than_the_cache_may_hold_all_open_their_data(
    store: ObjectStore,
    stored: Manifest,
    many_shards: Packed,  # noqa: F811
    tmp_path: Path,
) -> None:
    total = sum(shard.bytes for shard in shards_of(stored))
    other = put(store, inverted(many_shards, tmp_path / "other"))

    def open_twice(manifest: Manifest) -> list[int]:
        caches = [Cache(tmp_path / "cache", store, limit=total) for _ in range(2)]
        return [len(open_split(cache, manifest, "train").slice(0, 10**6)[0]) for cache in caches]

    with ThreadPoolExecutor(2) as pool:
        counts = list(pool.map(open_twice, (stored, other)))
    assert counts == [[stored.splits["train"].count] * 2] * 2


def test_a_rank_that_lacks_data_waits_for_the_storage(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store.put_bytes("shards/x", b"x")
    sha256, get_file, asked = hashlib.sha256(b"x").hexdigest(), ObjectStore.get_file, []

    def restarting(self: ObjectStore, *args: Any, **options: Any) -> None:
        asked.append(args)
        if len(asked) == 1:
            raise Outage("the store does not answer")
        get_file(self, *args, **options)

    monkeypatch.setattr(ObjectStore, "get_file", restarting)
    assert open_cache(store, PatientCache).fetch("shards/x", sha256, size=1).read_bytes() == b"x"
    assert len(asked) == 2
    assert [record.getMessage() for record in caplog.records if record.name == "infra.storage"] == [
        "trying again for up to 540 s: the store does not answer"
    ]
