"""Lists and reads folders on this machine or in a bucket. A file is named by its path in the folder."""

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from infra.errors import UsageError
from infra.machine.files import temporary_file
from infra.sources.listing import BATCH, Entry, Listing
from infra.storage.cache import Cache
from infra.storage.object_store import ObjectChanged, ObjectStore
from infra.storage.s3_client import ObjectMissing

OnFiles = Callable[[int], object]
"""Called with the number of files just found."""


class FolderLocation(Protocol):
    """The place of a folder."""

    @property
    def address(self) -> str:
        """`file:/folder` or `s3://bucket/prefix/`."""

    @property
    def marks_content(self) -> bool:
        """Whether equal versions prove equal content, at any later time."""

    def add_to(self, cache: Cache, path: str) -> tuple[str, str | None]:
        """Puts a file's present content into the cache; returns its SHA-256, and its version if that marks content."""

    def read(self, entry: Entry) -> bytes:
        """Returns the content of a file as it was listed; UsageError if it has changed since."""


@dataclass(frozen=True)
class LocalLocation:
    """A folder on this machine."""

    root: Path
    not_utf8: dict[str, Path] = field(default_factory=dict)
    """Files whose names are not valid UTF-8: escaped path → path."""

    marks_content: bool = False

    @property
    def address(self) -> str:
        return f"file:{self.root.absolute()}"

    def add_to(self, cache: Cache, path: str) -> tuple[str, str | None]:
        place = self._place(path)
        try:
            return cache.add_file(place), None
        except OSError as error:
            if error.filename != str(place):
                raise
            raise UsageError(f"{place} cannot be read: {error.strerror}") from error

    def read(self, entry: Entry) -> bytes:
        place = self._place(entry.path)
        try:
            with place.open("rb") as file:
                content = file.read()
                status = os.fstat(file.fileno())
        except FileNotFoundError:
            raise _changed(str(place)) from None
        except OSError as error:
            raise UsageError(f"{place} cannot be read: {error.strerror}") from error
        if (len(content), status.st_size, str(status.st_mtime_ns)) != (entry.size, entry.size, entry.version):
            raise _changed(str(place))
        return content

    def _place(self, path: str) -> Path:
        return self.not_utf8.get(path) or self.root / path


@dataclass(frozen=True)
class BucketLocation:
    """The objects of a bucket under a prefix, which is empty or ends in `/`."""

    store: ObjectStore
    prefix: str
    marks_content: bool = True

    @property
    def address(self) -> str:
        return self.store.uri(self.prefix)

    def add_to(self, cache: Cache, path: str) -> tuple[str, str | None]:
        with temporary_file(cache.root) as temporary:
            info = self.store.get_file(self.prefix + path, temporary)
            return cache.add_file(temporary), info.etag if info else None

    def read(self, entry: Entry) -> bytes:
        key = self.prefix + entry.path
        try:
            content = self.store.get_bytes(key, etag=entry.version)
        except (ObjectMissing, ObjectChanged):
            raise _changed(self.store.uri(key)) from None
        if len(content) != entry.size:
            raise _changed(self.store.uri(key))
        return content


class ListedFiles:
    """The files of a listing, read in place."""

    folders: tuple[str, ...] = ()

    def __init__(self, listing: Listing, location: FolderLocation) -> None:
        self._listing, self._location = listing, location
        self.paths = listing.paths

    def size(self, position: int) -> int:
        """Returns the bytes of a file, as listed."""
        return self._listing.size(position)

    def read(self, position: int) -> bytes:
        """Returns the content of a file.

        Raises:
            UsageError: the file has changed since it was listed, or cannot be read.
            ServiceError: the store failed.
        """
        return self._location.read(self._listing[position])


@dataclass(frozen=True, kw_only=True)
class FolderListing:
    """A folder with the files that were listed in it."""

    location: FolderLocation
    files: Listing
    folders: tuple[str, ...] = ()
    """Paths of all sub-folders; in a bucket, of those that have an object of their own."""

    unreachable: tuple[str, ...] = ()
    """Paths of entries that are no files: broken links, devices, keys with an empty part."""


def list_local(root: Path, on_files: OnFiles) -> FolderListing:
    """Lists a folder of this machine with its sub-folders, without hidden entries; follows links.

    Raises:
        UsageError: a folder in it cannot be read.
    """
    folders: list[str] = []
    unreachable: list[str] = []
    not_utf8: dict[str, Path] = {}

    def entries() -> Iterator[Entry]:
        for folder, names in _walk(root):  # strings: a million Path objects take longer than the disk
            inside = "" if folder == root else f"{folder.relative_to(root).as_posix()}/"
            if inside:
                folders.append(_text(inside[:-1]))
            for name in names:
                place = os.path.join(folder, name)
                path = _text(inside + name)
                status = regular_file(place)
                if status is None:
                    unreachable.append(path)
                else:
                    if path != inside + name:
                        not_utf8[path] = Path(place)
                    yield Entry(path, status.st_size, str(status.st_mtime_ns))

    files = Listing.collect(_counted(entries(), on_files))
    location = LocalLocation(root, not_utf8)
    return FolderListing(location=location, files=files, folders=tuple(folders), unreachable=tuple(unreachable))


def list_bucket(store: ObjectStore, prefix: str, on_files: OnFiles) -> FolderListing:
    """Lists the objects of a bucket under a prefix, without hidden files and folders.

    An empty object whose key ends in `/` is a folder; S3's console creates folders so.

    Raises:
        ServiceError: the store failed.
    """
    prefix = prefix.rstrip("/") + "/" if prefix.strip("/") else ""
    folders: list[str] = []
    unreachable: list[str] = []

    def entries() -> Iterator[Entry]:
        for info in store.list(prefix):
            path = info.key.removeprefix(prefix)
            parts = [part for part in path.split("/") if part]
            clean = "/".join(parts)
            if not parts or any(map(_is_hidden, parts)):
                continue
            if path == clean:
                yield Entry(path, info.size, info.etag)
            elif path == f"{clean}/" and not info.size:
                folders.append(path)
            else:
                unreachable.append(clean)

    files = Listing.collect(_counted(entries(), on_files))
    location = BucketLocation(store, prefix)
    return FolderListing(location=location, files=files, folders=tuple(folders), unreachable=tuple(unreachable))


def _changed(where: str) -> UsageError:
    return UsageError(f"{where} has changed since the folder was listed; start again when no program writes to it")


def _counted(entries: Iterator[Entry], on_files: OnFiles) -> Iterator[Entry]:
    """Yields the entries; calls `on_files` after every `BATCH` of them."""
    for number, entry in enumerate(entries, start=1):
        yield entry
        if number % BATCH == 0:
            on_files(BATCH)


def _walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yields each folder below `root` with the names of its files; follows links, but not in circles.

    Two links to one folder count as two folders, as for other programs: `val` may be a link to `test`.
    """

    def refuse(error: OSError) -> None:
        raise UsageError(f"{error.filename} cannot be read: {error.strerror}") from error

    above: list[tuple[str, tuple[int, int]]] = []  # the folders around this one, with device and inode
    for folder, inner, names in os.walk(root, followlinks=True, onerror=refuse):
        while above and not folder.startswith(above[-1][0]):
            above.pop()
        status = os.stat(folder)
        identity = status.st_dev, status.st_ino
        if any(identity == each for _, each in above):
            inner.clear()
            continue
        above.append((os.path.join(folder, ""), identity))
        inner[:] = sorted(name for name in inner if not _is_hidden(name))
        yield Path(folder), [name for name in names if not _is_hidden(name)]


def _is_hidden(name: str) -> bool:
    """Returns whether a name is hidden, or that of a file that macOS or Windows creates."""
    return name.startswith(".") or name in {"__MACOSX", "Thumbs.db"}


def regular_file(place: str) -> os.stat_result | None:
    """Returns the status of a regular file; None for anything else, a broken link included."""
    try:
        status = os.stat(place)
    except OSError:
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def _text(path: str) -> str:
    """Returns a path as text; bytes that are not valid UTF-8 are escaped."""
    return os.fsencode(path).decode(errors="backslashreplace")
