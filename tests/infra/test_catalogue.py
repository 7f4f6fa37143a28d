"""Data sets of the catalogue are fetched from mirrors into a real bucket, and reused."""

import gzip
import hashlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from infra.errors import ServiceError, UsageError
from infra.sources.base import Workplace, reusable
from infra.sources.catalogue import CatalogueSource
from infra.sources.entries import CATALOGUE, CatalogueEntry, CatalogueFile, check_dataset
from infra.sources.mirrors import SCHEMES
from infra.sources.raw_data import RawSource, read_record
from infra.storage import bucket_layout
from tests.infra.webserver import WebServer, web_server

CONTENTS = {"images": os.urandom(90_000), "labels": os.urandom(500), "more": os.urandom(2_000)}


@pytest.fixture
def web() -> Iterator[WebServer]:
    with web_server() as server:
        for name, content in CONTENTS.items():
            server.files[f"/set/{name}.gz"] = gzip.compress(content)
        yield server


@pytest.fixture
def source(web: WebServer, tmp_path: Path) -> CatalogueSource:
    """Three gzip files, one of which has no known SHA-256; a dead mirror before the live one."""
    files = []
    for name, content in CONTENTS.items():
        packed = web.files[f"/set/{name}.gz"]
        known = {"sha256": hashlib.sha256(content).hexdigest()}
        if name == "more":
            known = {"md5": hashlib.md5(packed).hexdigest()}
        files.append(CatalogueFile(name=f"{name}.gz", size=len(content), **known))
    entry = CatalogueEntry(
        name="small-set",
        format="idx",
        homepage=web.url,
        licence="none",
        citation="none",
        classes=("cat", "dog"),
        files=tuple(files),
        mirrors=("http://127.0.0.1:9/set", f"{web.url}/set/"),
    )
    return CatalogueSource(entry)


def _check(raw: RawSource, place: Workplace) -> None:
    assert {file.path: file.size for file in raw.files} == {n: len(c) for n, c in CONTENTS.items()}
    for file in raw.files:
        assert place.store.get_bytes(f"raw/{file.sha256}") == CONTENTS[file.path]
        info = place.store.head(file.key)
        assert info is not None and info.sha256 == file.sha256


def _forget(place: Workplace, raw: RawSource, path: str) -> None:
    """Removes one file from the cache."""
    place.cache.path(next(file.sha256 for file in raw.files if file.path == path)).unlink()


def test_files_arrive_unpacked_in_the_bucket_with_their_origin(
    source: CatalogueSource, place: Workplace, web: WebServer
) -> None:
    moved: list[int] = []
    raw = source.fetch(place, moved.append)
    _check(raw, place)
    assert (raw.name, raw.format, raw.classes, raw.reused) == ("small-set", "idx", ("cat", "dog"), False)
    assert raw.served_by == {name: f"{web.url}/set/{name}.gz" for name in CONTENTS}
    assert sum(moved) == source.size == sum(map(len, CONTENTS.values()))
    assert read_record(place.store, source.key) == raw


def test_present_files_are_found_without_asking_a_mirror(
    source: CatalogueSource, place: Workplace, web: WebServer
) -> None:
    raw = source.fetch(place, lambda _: None)
    asked = len(web.requests)
    again = reusable(source, place)
    assert again is not None and again.reused
    assert again.model_copy(update={"reused": False}) == raw and again.digest == raw.digest
    assert source.fetch(place, lambda _: None).reused
    assert len(web.requests) == asked


def test_nothing_is_reusable_before_the_first_download(source: CatalogueSource, place: Workplace) -> None:
    assert reusable(source, place) is None


@pytest.mark.parametrize("path", ["labels", "more"])
@pytest.mark.parametrize("damage", ["gone", "cut short"])
def test_only_a_missing_or_damaged_object_is_fetched_again(
    source: CatalogueSource, place: Workplace, web: WebServer, path: str, damage: str
) -> None:
    raw = source.fetch(place, lambda _: None)
    key = next(file.key for file in raw.files if file.path == path)
    _forget(place, raw, path)
    place.store.delete(key)
    if damage == "cut short":
        place.store.put_bytes(key, CONTENTS[path][:-1])
    web.requests.clear()
    assert reusable(source, place) is None
    again = source.fetch(place, lambda _: None)
    _check(again, place)
    assert [asked for _, asked, _ in web.requests] == [f"/set/{path}.gz"]
    assert not again.reused and again.digest == raw.digest and again.served_by == raw.served_by


def test_a_missing_object_comes_from_the_cache_if_it_is_there(
    source: CatalogueSource, place: Workplace, web: WebServer
) -> None:
    raw = source.fetch(place, lambda _: None)
    for file in raw.files:
        place.store.delete(file.key)
    web.requests.clear()
    _check(source.fetch(place, lambda _: None), place)
    assert web.requests == []


def test_a_damaged_cache_does_not_reach_the_bucket(source: CatalogueSource, place: Workplace, web: WebServer) -> None:
    raw = source.fetch(place, lambda _: None)
    file = next(file for file in raw.files if file.path == "images")
    place.store.delete(file.key)
    cached = place.cache.path(file.sha256)
    cached.chmod(0o600)
    cached.write_bytes(bytes(file.size))
    _check(source.fetch(place, lambda _: None), place)
    assert len(web.gets("/set/images.gz")) == 2


def test_refresh_fetches_everything_anew(source: CatalogueSource, place: Workplace, web: WebServer) -> None:
    source.fetch(place, lambda _: None)
    web.requests.clear()
    raw = source.fetch(place, lambda _: None, refresh=True)
    _check(raw, place)
    assert not raw.reused and len(web.requests) == 3


def test_a_file_that_no_mirror_has_right_leaves_no_record(
    source: CatalogueSource, place: Workplace, web: WebServer
) -> None:
    web.files["/set/labels.gz"] = gzip.compress(b"other labels")
    with pytest.raises(ServiceError) as raised:
        source.fetch(place, lambda _: None)
    message = str(raised.value)
    assert message.startswith("small-set: no mirror has labels.gz") and "\n" not in message
    assert hashlib.sha256(b"other labels").hexdigest() in message
    assert hashlib.sha256(CONTENTS["labels"]).hexdigest() in message
    assert "127.0.0.1:9" in message and web.url in message
    assert place.store.head(bucket_layout.source_record(source.key)) is None
    web.files["/set/labels.gz"] = gzip.compress(CONTENTS["labels"])
    _check(source.fetch(place, lambda _: None), place)


def test_of_several_downloads_at_once_one_fetches(source: CatalogueSource, place: Workplace, web: WebServer) -> None:
    together = threading.Barrier(3)

    def fetch(_: int) -> RawSource:
        together.wait()
        return source.fetch(place, lambda _: None)

    with ThreadPoolExecutor(3) as pool:
        sources = list(pool.map(fetch, range(3)))
    assert sorted(raw.reused for raw in sources) == [False, True, True]
    assert len(web.requests) == 3


def test_an_interrupted_download_stops_its_other_files(
    source: CatalogueSource, place: Workplace, web: WebServer
) -> None:
    class Interrupt(BaseException):
        pass

    def interrupt(_: int) -> None:
        raise Interrupt

    with pytest.raises(Interrupt):
        source.fetch(place, interrupt)
    assert place.store.head(bucket_layout.source_record(source.key)) is None
    _check(source.fetch(place, lambda _: None), place)


def test_the_users_mirror_is_asked_first(source: CatalogueSource, place: Workplace, tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "small-set"
    folder.mkdir(parents=True)
    (folder / "images.gz").write_bytes(gzip.compress(CONTENTS["images"]))
    raw = CatalogueSource(source.entry, str(tmp_path / "mine")).fetch(place, lambda _: None)
    assert raw.served_by["images"] == f"file:{folder}/images.gz"
    assert raw.served_by["labels"].startswith("http://")


def test_a_damaged_record_says_how_to_repair_it(source: CatalogueSource, place: Workplace) -> None:
    place.store.put_bytes(bucket_layout.source_record(source.key), b"{}")
    with pytest.raises(ServiceError, match="damaged; fetch the data again with --refresh"):
        reusable(source, place)
    _check(source.fetch(place, lambda _: None, refresh=True), place)


def test_digits_come_from_scikit_learn(place: Workplace) -> None:
    entry = next(entry for entry in CATALOGUE if entry.name == "digits")
    raw = CatalogueSource(entry).fetch(place, lambda _: None)
    assert [file.path for file in raw.files] == ["digits.csv"]
    assert raw.served_by == {"digits.csv": "package:sklearn/datasets/data/digits.csv.gz"}
    assert place.store.get_bytes(raw.files[0].key).count(b"\n") == 1797


def test_a_folder_of_an_unknown_user_is_no_folder() -> None:
    with pytest.raises(UsageError, match="no such folder"):
        check_dataset("~no-such-user/photos")


def test_the_catalogue_is_sound() -> None:
    names = [entry.name for entry in CATALOGUE]
    assert len(names) == len(set(names)) == len({entry.digest for entry in CATALOGUE})
    for entry in CATALOGUE:
        assert entry.licence and entry.citation and entry.homepage.startswith("http")
        assert entry.mirrors and all(mirror.startswith(SCHEMES) for mirror in entry.mirrors)
        assert len({file.path for file in entry.files}) == len(entry.files)


def test_the_published_digests_agree_with_torchvision() -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    for name, published in {"mnist": datasets.MNIST, "kmnist": datasets.KMNIST}.items():
        entry = next(entry for entry in CATALOGUE if entry.name == name)
        assert {(file.name, file.md5) for file in entry.files} == set(published.resources)
    fashion = next(entry for entry in CATALOGUE if entry.name == "fashion-mnist")
    assert {file.name for file in fashion.files} == {name for name, _ in datasets.FashionMNIST.resources}
    assert list(fashion.classes) == datasets.FashionMNIST.classes
