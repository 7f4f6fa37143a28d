"""A preprocessing that is killed during survey or packing, or whose store is down for a while: the same result."""

import io
import multiprocessing
import os
import random
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

import cnn.preprocessing.survey
from cnn.config.preprocessing import PreprocessConfig
from infra.errors import Outage
from infra.settings import Settings
from infra.sources.location import LocalLocation
from infra.sources.raw_data import RawSource
from infra.stack.local_stack import down, up
from infra.stack.ports import PORT_RANGE
from infra.storage import bucket_layout
from infra.storage.object_store import ObjectStore
from tasks.data.dataset import load_manifest, shards_of
from tasks.data.download import download
from tasks.data.preprocess import preprocess
from tasks.data.preprocessing_journal import Journal

CONFIG = PreprocessConfig(image_size=8, resize="pad", shard_bytes=64 * 50, max_unreadable=0.1)  # 50 images
IMAGES = 900
PART = 100
READ = {"note_part": "survey_parts", "note_shard": "shards"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits in class folders, some of them damaged, and most without their last rows."""
    root = tmp_path_factory.mktemp("source") / "digits"
    digits = load_digits()
    for number in range(IMAGES):
        place = root / str(digits.target[number]) / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        file = io.BytesIO()
        pixels = np.round(digits.images[number][: 8 - number % 3] * 255 / 16).astype(np.uint8)
        Image.fromarray(pixels).save(file, "PNG")
        place.write_bytes(file.getvalue()[: -20 if number % 60 == 0 else None])
    return root


@pytest.fixture
def machine(store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes this process one on a machine of that name."""
    monkeypatch.setattr(cnn.preprocessing.survey, "PART_IMAGES", PART)
    monkeypatch.setenv("CONVOY_BUCKET", store.bucket)

    def be(name: str) -> None:
        monkeypatch.setenv("CONVOY_HOME", str(tmp_path / name))

    be("first")
    return be


def run(folder: Path, keep_raw: bool = False) -> str:
    """The resulting version."""
    return preprocess.fn(download.fn(str(folder), PreprocessConfig(keep_raw=keep_raw)), CONFIG).version


def stuck(raw: RawSource, environment: dict[str, str], method: str, entries: int, said: Connection) -> None:
    """Preprocesses in a process of its own until the journal has enough entries; then waits to be killed."""
    os.environ.update(environment)
    cnn.preprocessing.survey.PART_IMAGES = PART
    note = getattr(Journal, method)

    def noting(self: Journal, what: Any) -> None:
        note(self, what)
        if len(getattr(self, READ[method])()) >= entries:
            said.send("noted")
            threading.Event().wait()

    setattr(Journal, method, noting)
    preprocess.fn(raw, CONFIG)
    said.send("done")


def kill_after(raw: RawSource, method: str, entries: int) -> None:
    """Kills a preprocessing as soon as the journal has so many entries that count: uploads end in any order."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe()
    process = context.Process(target=stuck, args=(raw, dict(os.environ), method, entries, theirs))
    process.start()
    try:
        assert ours.poll(60) and ours.recv() == "noted"
    finally:
        process.kill()
        process.join()


@pytest.mark.long
@pytest.mark.parametrize("keep_raw", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["in place", "kept"])
def test_killed_again_and_again_it_gives_the_same_version(
    store: ObjectStore, folder: Path, machine: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, keep_raw: bool
) -> None:
    expected = run(folder, keep_raw)
    manifest = store.get_bytes(f"datasets/{expected}/manifest.json")
    for info in list(store.list("")):
        store.delete(info.key)
    machine("second")
    raw = download.fn(str(folder), PreprocessConfig(keep_raw=keep_raw))
    kill_after(raw, "note_part", 2)
    kill_after(raw, "note_part", 5)
    surveyed = list(store.list("journals/"))
    assert len(surveyed) == 5
    kill_after(raw, "note_shard", 1)
    kill_after(raw, "note_shard", 5)
    shards = {info.key: info.modified for info in store.list("shards/")}
    assert len(shards) >= 5 and not list(store.list("datasets/"))
    machine("third")
    reads: list[str] = []
    read = LocalLocation.read
    monkeypatch.setattr(LocalLocation, "read", lambda self, entry: reads.append(entry.path) or read(self, entry))
    assert preprocess.fn(raw, CONFIG).version == expected
    assert keep_raw or 0 < len(reads) < IMAGES - 100  # neither surveyed nor packed again
    assert store.get_bytes(f"datasets/{expected}/manifest.json") == manifest
    after = {info.key: info.modified for info in store.list("shards/")}
    assert after.items() >= shards.items()
    assert set(after) == {bucket_layout.shard(shard.sha256) for shard in shards_of(load_manifest(store, expected))}
    assert not list(store.list("journals/"))


@pytest.mark.long
def test_a_journal_with_gaps_or_damage_is_used_as_far_as_it_goes(
    store: ObjectStore, folder: Path, machine: Callable[[str], None]
) -> None:
    expected = run(folder)
    for info in list(store.list("")):
        store.delete(info.key)
    raw = download.fn(str(folder), PreprocessConfig(keep_raw=False))
    kill_after(raw, "note_shard", 6)
    parts = [info.key for info in store.list("journals/") if "/survey/" in info.key]
    store.delete(parts[3])
    store.put_bytes(parts[5], b"PK but no zip")
    noted = [info.key for info in store.list("journals/") if "/shards/train/" in info.key]
    store.put_bytes(noted[2], b"{")
    store.delete(next(store.list("shards/")).key)
    assert preprocess.fn(raw, CONFIG).version == expected
    assert {info.key for info in store.list("shards/")} >= {
        bucket_layout.shard(shard.sha256) for shard in shards_of(load_manifest(store, expected))
    }


@pytest.mark.slow
def test_without_its_store_for_a_while_it_goes_on_later(
    folder: Path, machine: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(folder)
    port = random.choice(PORT_RANGE)
    note, notes = Journal.note_shard, 0

    def noting(self: Journal, packed: Any) -> None:
        nonlocal notes
        note(self, packed)
        notes += 1
        if notes == 3:
            down(own())

    def own() -> Settings:
        return Settings(home=tmp_path / "own", s3_port=port)

    def start() -> None:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        for name, value in up(own(), only=["seaweedfs"]).environment().items():
            monkeypatch.setenv(name, value)

    try:
        start()
        raw = download.fn(str(folder), PreprocessConfig(keep_raw=False))
        with monkeypatch.context() as context:
            context.setattr(Journal, "note_shard", noting)
            with pytest.raises(Outage, match=r"no connection|connection failed"):
                preprocess.fn(raw, CONFIG)
        start()
        journal = [info.key for info in ObjectStore.connect("test").list("journals/")]
        assert sum("/shards/" in key for key in journal) >= 3
        assert preprocess.fn(raw, CONFIG).version == expected
    finally:
        down(own())
