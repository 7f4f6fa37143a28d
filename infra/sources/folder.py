"""A folder of images, local or in a bucket. Which of its files are images is not decided here."""

import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from infra.cache import Cache
from infra.errors import UsageError
from infra.files import OnBytes, temporary_file
from infra.meter import Meter, in_parallel
from infra.objectstore import ObjectStore
from infra.raw import RawBucket, RawFile, RawSource, write_record
from infra.sources.base import Workplace, slug, source_key


class FolderFile(Protocol):
    """One file of a folder."""

    @property
    def path(self) -> str:
        """Relative to the folder, with `/`."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def version(self) -> str | None:
        """The store's mark of this version of it; None: it has to be read to be known."""

    def add_to(self, cache: Cache) -> str:
        """Put the content into the cache; returns its SHA-256."""


@dataclass(frozen=True)
class LocalFile:
    """A file on this machine."""

    path: str
    size: int
    place: Path
    version: str | None = None

    def add_to(self, cache: Cache) -> str:
        try:
            return cache.add_file(self.place)
        except OSError as error:
            if error.filename != str(self.place):
                raise
            raise UsageError(f"{self.place} cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class BucketFile:
    """An object in a bucket."""

    path: str
    size: int
    version: str
    store: ObjectStore
    key: str

    def add_to(self, cache: Cache) -> str:
        with temporary_file(cache.root) as temporary:
            self.store.get_file(self.key, temporary)
            return cache.add_file(temporary)


@dataclass(frozen=True, kw_only=True)
class FolderSource:
    """See `infra.sources.base.Source`."""

    address: str
    title: str
    """The folder's own name."""

    files: tuple[FolderFile, ...]
    folders: tuple[str, ...] = ()
    """Paths of all sub-folders, where they exist without files."""

    @property
    def name(self) -> str:
        return slug(self.title)

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of all files."""
        return tuple(file.path for file in self.files)

    @property
    def key(self) -> str | None:
        if not all(file.version for file in self.files):
            return None
        return source_key("folder", self.address, [[file.path, file.size, file.version] for file in self.files])

    def only(self, paths: Iterable[str]) -> "FolderSource":
        """The same folder with these files only."""
        wanted = set(paths)
        return replace(self, files=tuple(file for file in self.files if file.path in wanted))

    def fetch(self, place: Workplace, on_bytes: OnBytes, *, refresh: bool = False) -> RawSource:
        """Files are hashed, cached and uploaded side by side; equal ones are stored once."""
        bucket = RawBucket(place.store, place.cache, expected_files=len(self.files))
        stop = threading.Event()

        def bring(file: FolderFile) -> tuple[RawFile, bool]:
            meter = Meter(file.size, on_bytes, stop)
            meter.at(0.0)
            digest = file.add_to(place.cache)
            raw = RawFile(path=file.path, sha256=digest, size=place.cache.path(digest).stat().st_size)
            present = not refresh and bucket.holds(raw)
            if not present:
                bucket.put(raw)
            meter.at(1.0)
            return raw, present

        brought = in_parallel(bring, self.files, stop)
        source = RawSource(
            name=self.name,
            format="folder",
            files=tuple(raw for raw, _ in brought),
            served_by={".": self.address},
            reused=all(present for _, present in brought),
        )
        if self.key:
            write_record(place.store, self.key, source)
        return source


def local_folder(root: Path) -> FolderSource:
    """A folder on this machine with all it holds, hidden files and folders left out; links are followed.

    Raises:
        UsageError: something in it cannot be read.
    """
    files, folders = [], []
    for folder, names in _walk(root):
        relative = folder.relative_to(root)
        if folder != root:
            folders.append(_text(relative))
        for name in names:
            if (folder / name).is_file():
                size = (folder / name).stat().st_size
                files.append(LocalFile(_text(relative / name), size, folder / name))
    absolute = root.absolute()
    title = absolute.name or absolute.resolve().name
    return FolderSource(address=f"file:{absolute}", title=title, files=tuple(files), folders=tuple(folders))


def bucket_folder(store: ObjectStore, prefix: str) -> FolderSource:
    """What a bucket holds under a prefix, hidden files and folders left out.

    Raises:
        ServiceError: the store failed.
    """
    prefix = prefix.rstrip("/") + "/" if prefix.strip("/") else ""
    files = []
    for info in store.list(prefix):
        path = info.key.removeprefix(prefix)
        if not any(_is_hidden(part) for part in path.split("/")):
            files.append(BucketFile(path, info.size, info.etag, store, info.key))
    title = prefix.rstrip("/").rpartition("/")[2] or store.bucket
    return FolderSource(address=store.uri(prefix), title=title, files=tuple(files))


def _walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Every folder below and its file names, each folder once, even where links lead in circles."""

    def refuse(error: OSError) -> None:
        raise UsageError(f"{error.filename} cannot be read: {error.strerror}") from error

    seen = set()
    for folder, inner, names in os.walk(root, followlinks=True, onerror=refuse):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            inner.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        inner[:] = sorted(name for name in inner if not _is_hidden(name))
        yield Path(folder), sorted(name for name in names if not _is_hidden(name))


def _is_hidden(name: str) -> bool:
    """Also what other systems leave behind, and the empty names that doubled slashes in a key make."""
    return not name or name.startswith(".") or name in {"__MACOSX", "Thumbs.db"}


def _text(path: Path) -> str:
    """A path as text, also where a name is not valid UTF-8."""
    return os.fsencode(path.as_posix()).decode(errors="backslashreplace")
