"""The preprocess task against a real object store: what it writes, when it is skipped, what it repairs."""

import gzip
import hashlib
import io
import json
import os
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from cnn.config.preprocessing import PreprocessConfig, Resize
from cnn.errors import InputError
from cnn.preprocessing.pack import Packed, pack
from infra.errors import ServiceError, UsageError
from infra.sources.raw_data import RawFile, RawSource
from infra.storage import bucket_layout
from infra.storage.cache import Cache
from infra.storage.object_store import ObjectStore
from infra.storage.s3_client import ObjectMissing
from tasks.data.dataset import DatasetDamaged, DatasetRef, load_manifest, open_split, shards_of
from tasks.data.download import download
from tasks.data.preprocess import preprocess, step_key
from tests.infra.test_cache import flip

CSV = gzip.decompress(files("sklearn.datasets.data").joinpath("digits.csv.gz").read_bytes())
CONFIG = PreprocessConfig()


@pytest.fixture
def home(store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state folder of a machine that uses the test's bucket."""
    monkeypatch.setenv("CONVOY_BUCKET", store.bucket)
    monkeypatch.setenv("CONVOY_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def put_raw(store: ObjectStore, content: bytes, name: str = "digits") -> RawSource:
    file = RawFile(path="digits.csv", sha256=hashlib.sha256(content).hexdigest(), size=len(content))
    store.put_bytes(file.key, content)
    return RawSource(name=name, format="digits", files=(file,), served_by={})


@pytest.fixture
def raw(store: ObjectStore) -> RawSource:
    return put_raw(store, CSV)


def run(raw: RawSource, config: PreprocessConfig = CONFIG, *, refresh: bool = False) -> DatasetRef:
    return preprocess.fn(raw, config, refresh=refresh)


def keys(store: ObjectStore, prefix: str) -> list[str]:
    return [info.key for info in store.list(prefix)]


def test_shards_manifest_and_step_record_are_stored_under_their_digests(
    store: ObjectStore, raw: RawSource, home: Path
) -> None:
    dataset = run(raw)
    assert (dataset.name, dataset.reused) == ("digits", False)
    assert (
        hashlib.sha256(store.get_bytes(bucket_layout.dataset_manifest(dataset.version))).hexdigest() == dataset.version
    )
    manifest = load_manifest(store, dataset.version)
    assert keys(store, "shards/") == sorted(bucket_layout.shard(shard.sha256) for shard in shards_of(manifest))
    for shard in shards_of(manifest):
        content = store.get_bytes(bucket_layout.shard(shard.sha256))
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (shard.sha256, shard.bytes)
    record = json.loads(store.get_bytes(f"steps/preprocess/{step_key(raw, CONFIG)}.json"))
    assert record == {"dataset_version": dataset.version, "raw": raw.digest}
    assert not list((home / "work").iterdir())


def test_another_machine_reads_the_packed_images(
    store: ObjectStore, raw: RawSource, home: Path, tmp_path: Path
) -> None:
    manifest = load_manifest(store, run(raw).version)
    cache = Cache(tmp_path / "elsewhere", store)
    total = 0
    for split in manifest.splits:
        packed = open_split(cache, manifest, split)
        images, labels = packed.gather(torch.arange(len(packed)))
        assert torch.bincount(labels, minlength=10).tolist() == list(manifest.splits[split].class_counts)
        total += int(images.sum())
    assert total == np.round(load_digits().images * 255 / 16).sum()


@pytest.mark.parametrize(("limit", "held"), [("1GB", True), ("100kB", False)])
def test_shards_are_cached_only_within_the_limit_and_raw_files_take_the_place_of_others(
    store: ObjectStore, raw: RawSource, home: Path, limit: str, held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(home / "cache", store)
    before = cache.path(cache.add_stream(io.BytesIO(bytes(1000))))
    os.utime(before, (1, 1))
    monkeypatch.setenv("CONVOY_CACHE_BYTES", limit)
    manifest = load_manifest(store, run(raw).version)
    assert {cache.holds(shard.sha256) for shard in shards_of(manifest)} == {held}
    assert before.exists() == held


def test_a_second_run_is_skipped_even_without_the_raw_files(store: ObjectStore, raw: RawSource, home: Path) -> None:
    first = run(raw)
    store.delete(raw.files[0].key)
    shutil.rmtree(home)
    assert run(raw) == first.model_copy(update={"reused": True})


def test_other_parameters_data_or_class_names_are_another_step(store: ObjectStore, raw: RawSource, home: Path) -> None:
    first = run(raw)
    fewer = put_raw(store, b"".join(CSV.splitlines(keepends=True)[:-1]))
    named = raw.model_copy(update={"classes": ("a", "b")})
    others = [(raw, PreprocessConfig(split_seed=1)), (fewer, CONFIG), (named, CONFIG)]
    step_keys = {step_key(source, config) for source, config in [(raw, CONFIG), *others]}
    assert len(step_keys) == 4
    for source, config in others[:2]:
        dataset = run(source, config)
        assert not dataset.reused and dataset.version != first.version


def test_steps_that_crop_to_the_usual_sizes_keep_their_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys are those of a Convoy that did not have the choice, apart from its code."""
    monkeypatch.setattr("tasks.data.preprocess.code_digest", lambda files: "code")
    monkeypatch.setattr("tasks.data.preprocess.decoder_versions", lambda: {"pil": "1"})
    file = RawFile(path="digits.csv", sha256="0" * 64, size=1)
    raw = RawSource(name="x", format="digits", files=(file,), served_by={})
    small, large = PreprocessConfig(), PreprocessConfig(image_size=32)
    unset = "ea86e79c9b085e1efaa096929ab84f3341df935474f72caa518ef67b7e380cd7"
    given = "eb430692fe2cbb4879e383db7fa7280529b27b0b28b40df3418d9f136e963ead"
    assert (step_key(raw, small), step_key(raw, large)) == (unset, given)
    assert step_key(raw, small, 224) != unset
    assert step_key(raw, large, 224) == given  # the limit makes no difference
    keys = {step_key(raw, PreprocessConfig(resize=resize)) for resize in get_args(Resize)}
    assert len(keys) == 3 and unset in keys


def test_the_limit_of_an_unset_size_makes_another_version_of_large_images(
    store: ObjectStore, home: Path, tmp_path: Path
) -> None:
    for number in range(60):
        place = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((150, 200), number, dtype=np.uint8)).save(place)
    raw = download.fn(str(tmp_path / "images"))
    versions = [preprocess.fn(raw, CONFIG, max_default_size=limit).version for limit in (128, 224)]
    assert [load_manifest(store, version).image_size for version in versions] == [128, 150]
    assert preprocess.fn(raw, CONFIG, max_default_size=224).reused


@pytest.mark.long
def test_images_are_packed_again_if_a_damaged_one_decided_their_size(
    store: ObjectStore, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after an interruption behind the second packing, which then packs nothing."""
    place = tmp_path / "images"
    for number in range(59):
        path = place / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((30, 30), number, dtype=np.uint8)).save(path)
    config = PreprocessConfig(max_unreadable=0.02)
    expected = load_manifest(store, preprocess.fn(download.fn(str(place)), config).version)
    Image.fromarray(np.zeros((70, 70, 3), dtype=np.uint8)).save(place / "a" / "whole.jpg")
    (place / "a" / "cut.jpg").write_bytes((place / "a" / "whole.jpg").read_bytes()[:-100])
    (place / "a" / "whole.jpg").unlink()
    raw = download.fn(str(place))
    with monkeypatch.context() as patched:
        patched.setattr("tasks.data.preprocess.write_index", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            preprocess.fn(raw, config)
    packed: list[int] = []

    def pack_again(source: Any, plan: Any, config: Any, out: Any, advance: Any, *, done: Any, on_shard: Any) -> Packed:
        packed.append(plan.count - sum(each.shard.count for each in done))
        return pack(source, plan, config, out, advance, done=done, on_shard=on_shard)

    monkeypatch.setattr("tasks.data.preprocess.pack", pack_again)
    manifest = load_manifest(store, preprocess.fn(raw, config).version)
    assert packed == [1, 1]  # the damaged image, which comes after the last shard
    assert (manifest.channels, manifest.image_size, manifest.splits) == (1, 30, expected.splits)
    assert not list(store.list("journals/"))


def test_the_name_and_the_mirror_are_not_part_of_the_step(store: ObjectStore, raw: RawSource, home: Path) -> None:
    first = run(raw)
    same = RawSource(name="other", format="digits", files=raw.files, served_by={"digits.csv": "elsewhere"})
    assert run(same) == DatasetRef(version=first.version, name="other", reused=True)


def test_equal_results_of_different_steps_are_one_version(store: ObjectStore, raw: RawSource, home: Path) -> None:
    first = run(raw)
    before = keys(store, "datasets/")
    second = run(raw, PreprocessConfig(max_unreadable=0.5))
    assert (second.version, second.reused) == (first.version, False)
    assert keys(store, "datasets/") == before


def damage_shard_size(store: ObjectStore, dataset: DatasetRef, raw: RawSource) -> str:
    key = bucket_layout.shard(shards_of(load_manifest(store, dataset.version))[1].sha256)
    store.put_bytes(key, store.get_bytes(key)[:-1])
    return key


def damage_shard_content(store: ObjectStore, dataset: DatasetRef, raw: RawSource) -> str:
    key = bucket_layout.shard(shards_of(load_manifest(store, dataset.version))[1].sha256)
    store.put_bytes(key, store.get_bytes(key)[:-1] + b"?")
    return key


def delete_shard(store: ObjectStore, dataset: DatasetRef, raw: RawSource) -> str:
    key = bucket_layout.shard(shards_of(load_manifest(store, dataset.version))[0].sha256)
    store.delete(key)
    return key


def delete_manifest(store: ObjectStore, dataset: DatasetRef, raw: RawSource) -> str:
    store.delete(bucket_layout.dataset_manifest(dataset.version))
    return bucket_layout.dataset_manifest(dataset.version)


def damage_manifest(store: ObjectStore, dataset: DatasetRef, raw: RawSource) -> str:
    store.put_bytes(bucket_layout.dataset_manifest(dataset.version), b"{}")
    return bucket_layout.dataset_manifest(dataset.version)


def damage_record(store: ObjectStore, dataset: DatasetRef, raw: RawSource) -> str:
    key = f"steps/preprocess/{step_key(raw, CONFIG)}.json"
    store.put_bytes(key, b'{"dataset_ver')
    return key


def misdirect_record(store: ObjectStore, dataset: DatasetRef, raw: RawSource) -> str:
    key = f"steps/preprocess/{step_key(raw, CONFIG)}.json"
    store.put_bytes(key, json.dumps({"dataset_version": "0" * 64}).encode())
    return key


@pytest.mark.long
@pytest.mark.parametrize(
    "damage",
    [
        damage_shard_size,
        damage_shard_content,
        delete_shard,
        delete_manifest,
        damage_manifest,
        damage_record,
        misdirect_record,
    ],
)
def test_a_damaged_or_deleted_object_is_noticed_and_rebuilt(  # type: ignore[no-untyped-def]
    store: ObjectStore, raw: RawSource, home: Path, damage
) -> None:
    dataset = run(raw)
    before = {key: store.get_bytes(key) for key in keys(store, "")}
    damaged = damage(store, dataset, raw)
    assert run(raw) == dataset  # not reused
    assert store.get_bytes(damaged) == before[damaged]
    assert {key: store.get_bytes(key) for key in keys(store, "")} == before
    assert run(raw).reused


def test_refresh_computes_anew_and_comes_to_the_same(store: ObjectStore, raw: RawSource, home: Path) -> None:
    first = run(raw)
    again = run(raw, refresh=True)
    assert (again.version, again.reused) == (first.version, False)


def test_what_a_killed_run_left_does_not_disturb(store: ObjectStore, raw: RawSource, home: Path) -> None:
    leavings = home / "work" / f"preprocess-{step_key(raw, CONFIG)}"
    leavings.mkdir(parents=True)
    (leavings / "half.safetensors.tmp").write_bytes(b"half")
    run(raw)
    assert not leavings.exists()


@pytest.mark.long
@pytest.mark.parametrize("where", ["local", "bucket"])
def test_a_folder_read_in_place_gives_the_version_that_its_copy_gives(
    store: ObjectStore, home: Path, tmp_path: Path, where: str
) -> None:
    digits = load_digits()
    root = tmp_path / "images"
    for number in range(120):
        place = root / f"{digits.target[number]}" / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(digits.images[number] * 255 / 16).astype(np.uint8)).save(place)
        if where == "bucket":
            store.put_file(f"images/{place.relative_to(root)}", place)
    address = str(root) if where == "local" else f"s3://{store.bucket}/images"
    in_place = download.fn(address, PreprocessConfig(keep_raw=False))
    assert in_place.listing and len(in_place.model_dump_json()) < 1000
    dataset = run(in_place)
    assert not keys(store, "raw/")
    assert run(in_place).reused
    assert run(download.fn(address, PreprocessConfig(keep_raw=True))).version == dataset.version
    assert step_key(in_place, CONFIG) == step_key(in_place, PreprocessConfig(keep_raw=False))
    changed = root / "0" / "0.png" if where == "local" else "images/0/0.png"
    if isinstance(changed, Path):
        changed.write_bytes(b"x")
    else:
        store.put_bytes(changed, b"x")
    with pytest.raises(UsageError, match=r"images/0/0\.png has changed since the folder was listed"):
        run(in_place, refresh=True)


def test_a_version_larger_than_the_disk_does_not_go_into_the_cache(
    store: ObjectStore, raw: RawSource, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.data.shard_uploads.CACHE_SHARE", 0.0)
    config = PreprocessConfig(shard_bytes=6400)  # type: ignore[arg-type]
    manifest = load_manifest(store, run(raw, config).version)
    cache = Cache(home / "cache", store)
    assert len(shards_of(manifest)) > 15
    assert not any(cache.holds(shard.sha256) for shard in shards_of(manifest))
    assert sum(len(open_split(cache, manifest, split)) for split in manifest.splits) == 1797


def test_bad_data_is_refused_with_the_source_named_and_nothing_stored(store: ObjectStore, home: Path) -> None:
    bad = put_raw(store, CSV[: len(CSV) // 2 - 7], name="my-digits")
    with pytest.raises(InputError, match=r"^my-digits: digits\.csv is not the digits CSV") as refusal:
        run(bad)
    assert "\n" not in str(refusal.value)
    assert keys(store, "") == [bad.files[0].key]
    assert not list((home / "work").iterdir())


def test_a_damaged_raw_file_is_refused(store: ObjectStore, raw: RawSource, home: Path) -> None:
    store.put_bytes(raw.files[0].key, CSV[:-1] + b"?")
    with pytest.raises(ServiceError, match=raw.files[0].sha256):
        run(raw)
    assert keys(store, "") == [raw.files[0].key]


def test_a_raw_file_that_has_changed_on_this_disk_is_fetched_again(
    store: ObjectStore, raw: RawSource, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = run(raw)
    flip(Cache(home / "cache", store).fetch(raw.files[0].key, raw.files[0].sha256))
    again = run(raw, refresh=True)
    assert again.version == before.version
    assert f"{raw.files[0].sha256} is damaged" in caplog.text


def test_a_manifest_that_is_missing_or_does_not_match_its_version_is_refused(
    store: ObjectStore, raw: RawSource, home: Path
) -> None:
    version = run(raw).version
    with pytest.raises(ObjectMissing):
        load_manifest(store, "0" * 64)
    store.put_bytes(
        bucket_layout.dataset_manifest(version), store.get_bytes(bucket_layout.dataset_manifest(version)) + b" "
    )
    with pytest.raises(DatasetDamaged, match="is damaged: its SHA-256 is"):
        load_manifest(store, version)
    foreign = hashlib.sha256(b"{}").hexdigest()
    store.put_bytes(bucket_layout.dataset_manifest(foreign), b"{}")
    with pytest.raises(DatasetDamaged, match="not a dataset manifest"):
        load_manifest(store, foreign)
