"""Folders that are read in place: the listing, and files that change afterwards."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.errors import ServiceError, UsageError
from infra.sources.base import Workplace
from infra.sources.find import find_source
from infra.sources.folder import FolderSource
from infra.sources.labelled import open_location
from infra.sources.listing import BATCH, Entry, Listing
from infra.sources.location import ListedFiles
from infra.sources.raw_data import RawSource
from infra.storage.object_store import ObjectChanged, ObjectStore

IMAGES = {"cat/1.png": b"one", "cat/deep/2.png": b"two", "dog/1.png": b"three", "dog/\U0001f600.png": b"four"}


class Folder:
    """Files in a folder or under a prefix."""

    def __init__(self, address: str, put: Callable[[str, bytes], object], remove: Callable[[str], object]) -> None:
        self.address, self.put, self.remove = address, put, remove
        for path, content in IMAGES.items():
            put(path, content)


@pytest.fixture(params=["local", "bucket"])
def folder(request: pytest.FixtureRequest, store: ObjectStore, tmp_path: Path) -> Folder:
    if request.param == "bucket":
        return Folder(
            f"s3://{store.bucket}/My/Pets/",
            lambda path, content: store.put_bytes(f"My/Pets/{path}", content),
            lambda path: store.delete(f"My/Pets/{path}"),
        )
    root = tmp_path / "Pets"

    def put(path: str, content: bytes) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)

    return Folder(f"file:{root}", put, lambda path: (root / path).unlink())


def refer(place: Workplace, address: str, *, refresh: bool = False) -> RawSource:
    source = find_source(address, place.mirrors)
    assert isinstance(source, FolderSource)
    return source.refer(place, refresh=refresh)


def opened(place: Workplace, raw: RawSource) -> ListedFiles:
    assert raw.listing
    path = place.cache.fetch(raw.listing.key, raw.listing.sha256)
    return ListedFiles(Listing.load(path), open_location(raw.listing.address))


def test_only_a_listing_is_stored_and_the_files_are_read_where_they_lie(place: Workplace, folder: Folder) -> None:
    raw = refer(place, folder.address)
    assert raw.listing and (raw.listing.count, raw.listing.bytes) == (4, 15)
    assert (raw.name, raw.format, raw.files, raw.served_by) == ("pets", "folder", (), {".": folder.address})
    assert RawSource.model_validate_json(raw.model_dump_json()) == raw
    assert [info.key for info in place.store.list("") if not info.key.startswith("My/")] == [raw.listing.key]
    files = opened(place, raw)
    assert {path: files.read(position) for position, path in enumerate(files.paths)} == IMAGES
    assert [files.size(position) for position in range(4)] == [3, 3, 5, 4]


def test_it_is_found_unchanged_again_by_a_listing_alone(place: Workplace, folder: Folder) -> None:
    first = refer(place, folder.address)
    again = refer(place, folder.address)
    assert again == first.model_copy(update={"reused": True})
    assert refer(place, folder.address, refresh=True) == first
    folder.put("cat/new.png", b"new")
    assert refer(place, folder.address).digest != first.digest
    folder.remove("cat/new.png")
    assert refer(place, folder.address).digest == first.digest


@pytest.mark.parametrize("content", [b"eno", b"one and more", None], ids=["same size", "grown", "gone"])
def test_a_file_that_has_changed_since_is_named(place: Workplace, folder: Folder, content: bytes | None) -> None:
    files = opened(place, refer(place, folder.address))
    if content is None:
        folder.remove("cat/1.png")
    else:
        folder.put("cat/1.png", content)
    with pytest.raises(UsageError, match=r"Pets/cat/1\.png has changed since the folder was listed; start again") as e:
        files.read(0)
    assert "\n" not in str(e.value)
    assert files.read(2) == b"three"


def test_a_file_that_cannot_be_read_is_named(place: Workplace, tmp_path: Path) -> None:
    (tmp_path / "set" / "cat").mkdir(parents=True)
    (tmp_path / "set" / "cat" / "1.png").write_bytes(b"one")
    files = opened(place, refer(place, str(tmp_path / "set")))
    (tmp_path / "set" / "cat" / "1.png").unlink()
    (tmp_path / "set" / "cat" / "1.png").mkdir()
    with pytest.raises(UsageError, match=r"cat/1\.png cannot be read: Is a directory"):
        files.read(0)


def test_names_that_are_no_text_have_to_be_copied(place: Workplace, tmp_path: Path) -> None:
    (tmp_path / "set" / "cat").mkdir(parents=True)
    Path(os.fsdecode(os.fsencode(tmp_path / "set" / "cat") + b"/\xff.png")).write_bytes(b"x")
    with pytest.raises(UsageError, match=r"cat/\\xff\.png: its name is not valid UTF-8.*data\.keep_raw=true"):
        refer(place, str(tmp_path / "set"))


@pytest.mark.long
def test_a_listing_is_sorted_however_it_arrives_and_survives_a_file(tmp_path: Path) -> None:
    entries = [Entry(f"{number * 7919 % 25_000:05}.png", number, f"v{number}") for number in range(25_000)]
    entries.append(Entry("\U0001f600", 1, "x"))
    entries.append(Entry("\uff5e", 1, "x"))  # after the other in UTF-16, before it in code points
    listing = Listing.collect(iter(entries))
    assert list(listing) == sorted(entries) and list(listing.paths) == sorted(entry.path for entry in entries)
    assert (len(listing), listing.bytes) == (25_002, sum(entry.size for entry in entries))
    assert listing[777] == sorted(entries)[777] and listing.paths[777] == listing[777].path
    listing.save(tmp_path / "listing")
    loaded = Listing.load(tmp_path / "listing")
    assert list(loaded) == list(listing) and loaded.digest == listing.digest
    assert Listing.collect(entries[:-1]).digest != listing.digest
    assert len(Listing.collect([])) == 0


def test_progress_is_told_while_a_long_listing_is_made(place: Workplace, tmp_path: Path) -> None:
    (tmp_path / "many").mkdir()
    for number in range(BATCH + 5):
        (tmp_path / "many" / str(number)).touch()
    told: list[int] = []
    find_source(str(tmp_path / "many"), place.mirrors, on_files=told.append)
    assert told == [BATCH]


def test_a_version_of_an_object_is_read_or_refused(store: ObjectStore) -> None:
    store.put_bytes("x", b"one")
    info = store.head("x")
    assert info and store.get_bytes("x", etag=info.etag) == b"one"
    store.put_bytes("x", b"two")
    with pytest.raises(ObjectChanged, match="key x: it has changed"):
        store.get_bytes("x", etag=info.etag)
    assert issubclass(ObjectChanged, ServiceError)
