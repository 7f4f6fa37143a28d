"""Images that a label table names: files beside it, elsewhere on this machine, or objects of any bucket."""

import os
import unicodedata
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from os.path import commonprefix
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from infra.errors import UsageError, counted
from infra.machine.threads import in_parallel
from infra.sources.entries import METADATA, is_table, stem
from infra.sources.folder import FolderSource
from infra.sources.label_table import LabelTable, TableOptions, header_of, read_table
from infra.sources.listing import Entry, Listing
from infra.sources.location import BucketLocation, FolderLocation, LocalLocation, regular_file
from infra.storage.cache import Cache
from infra.storage.object_store import ObjectInfo, ObjectStore, parse_s3

LIST_FROM = 1000  # objects of one bucket; from here on listing their common prefix is faster than a request each
EXAMPLES = 3


@dataclass(frozen=True)
class TableLocation:
    """The files of a label table, named as the table names them."""

    base: FolderLocation
    """The table's own folder."""

    address: str
    """Of the table."""

    stores: dict[str, ObjectStore] = field(default_factory=dict, compare=False)
    """Buckets that are open."""

    @property
    def marks_content(self) -> bool:
        return isinstance(self.base, BucketLocation)  # such a table names no files of this machine

    def add_to(self, cache: Cache, path: str) -> tuple[str, str | None]:
        location, inner = self.place(path)
        return location.add_to(cache, inner)

    def read(self, entry: Entry) -> bytes:
        location, inner = self.place(entry.path)
        return location.read(entry._replace(path=inner))

    def place(self, path: str) -> tuple[FolderLocation, str]:
        """Returns the location of a file, and its path there."""
        if path.startswith("s3://"):
            bucket, key = parse_s3(path)
            if bucket not in self.stores:
                self.stores[bucket] = ObjectStore.connect(bucket, create=False)
            return BucketLocation(self.stores[bucket], ""), key
        if path.startswith("/"):
            return LocalLocation(Path("/")), path[1:]
        return self.base, path

    def entries(self, paths: Sequence[str]) -> Iterator[Entry | None]:
        """Yields each file with its size and version; None for one that is missing, or no file."""
        objects = self._objects(path for path in paths if not self._is_local(path))
        for path in paths:
            if self._is_local(path):
                location, inner = self.place(path)
                assert isinstance(location, LocalLocation)
                status = regular_file(os.path.join(location.root, inner))
                yield Entry(path, status.st_size, str(status.st_mtime_ns)) if status else None
            else:
                info = objects.get(path)
                yield Entry(path, info.size, info.etag) if info else None

    def _is_local(self, path: str) -> bool:
        return not path.startswith("s3://") and (path.startswith("/") or isinstance(self.base, LocalLocation))

    def _objects(self, paths: Iterable[str]) -> dict[str, ObjectInfo]:
        """Returns the objects that exist, by path; some 500 bytes of memory per object."""
        wanted: dict[str, dict[str, str]] = defaultdict(dict)  # bucket → key → path
        stores: dict[str, ObjectStore] = {}
        for path in paths:
            location, inner = self.place(path)
            assert isinstance(location, BucketLocation)
            stores[location.store.bucket] = location.store
            wanted[location.store.bucket][location.prefix + inner] = path
        found: dict[str, ObjectInfo] = {}
        for bucket, keys in wanted.items():
            if len(keys) < LIST_FROM:
                infos: Iterable[ObjectInfo | None] = in_parallel(stores[bucket].head, keys)
            else:
                infos = stores[bucket].list(commonprefix(list(keys)))  # noqa: RUF071  a prefix of keys
            found |= {keys[info.key]: info for info in infos if info and info.key in keys}
        return found


def open_location(address: str) -> FolderLocation:
    """Returns the location of a folder, or of the files of a label table, by its address."""
    folder, _, name = address.rpartition("/")
    if is_table(name) and not os.path.isdir(address.removeprefix("file:")):
        return TableLocation(open_location(f"{folder}/"), address)
    if address.startswith("file:"):
        return LocalLocation(Path(address.removeprefix("file:")))
    bucket, prefix = parse_s3(address)
    return BucketLocation(ObjectStore.connect(bucket, create=False), prefix)


def labelled_images(file: Path, name: str, base: FolderLocation, address: str, options: TableOptions) -> FolderSource:
    """Returns the images of a label table.

    Args:
        file: the table on this machine.
        name: the table's own name.
        base: the table's folder.
        address: of the table.

    Raises:
        ServiceError: a bucket failed.
        UsageError: the table is faulty, or too many of its files are missing.
    """
    table = read_table(file, name, options, in_bucket=isinstance(base, BucketLocation))
    location = TableLocation(base, address)
    paths, kept, missing = table.required("path"), array("q"), array("q")

    def present() -> Iterator[Entry]:
        for position, entry in enumerate(location.entries(paths)):
            (missing if entry is None else kept).append(position)
            if entry is not None:
                yield entry

    files = Listing.collect(present())
    examples, more = missing[:EXAMPLES], ", ..." * (len(missing) > EXAMPLES)
    if missing and (len(missing) > options.max_missing * len(table) or not kept):
        rows = table.rows
        named = ", ".join(f"{paths[position]} (row {rows[position]})" for position in examples) + more
        raise UsageError(
            f"{name}: {len(missing):,} of its {counted(len(table), 'file')} cannot be read, and "
            f"data.max_unreadable is {options.max_missing:g}: {named}; correct the table, or fetch the files"
        )
    # No numbers of rows: these words are part of the dataset version, and the order of the rows is not.
    named = ", ".join(paths[position] for position in examples) + more
    remarks = (f"{counted(len(missing), 'row')} of the label table left out, without a file: {named}",)
    labels = [unicodedata.normalize("NFC", label) for label in table.required("label")]  # as classes are named
    return FolderSource(
        location=location,
        files=files,
        labels=table.take(np.array(kept)),
        title=Path(address).parent.name if name == METADATA else stem(name),
        remarks=remarks if missing else (),
        left_out=dict(sorted(Counter(labels[position] for position in missing).items())),
    )


def with_metadata(folder: FolderSource, root: str, options: TableOptions) -> tuple[FolderSource, LabelTable] | None:
    """Reads the table `metadata.csv` beside class folders.

    Args:
        root: path of the folders around the class folders, with a slash at its end or empty.

    Returns:
        The folder without the table, and the table; None if there is none, or one of something else.

    Raises:
        ServiceError: the bucket failed.
        UsageError: the table is faulty.
    """
    position = folder.files.position(root + METADATA)
    if position is None:
        return None
    with TemporaryDirectory() as temporary:
        file = Path(temporary, METADATA)
        file.write_bytes(folder.location.read(folder.files[position]))
        if not options.are_in(header_of(file, METADATA)):
            return None  # a table of something else
        table = read_table(file, METADATA, options, labelled=False, in_bucket=True)
    others = np.delete(np.arange(len(folder.files)), position)
    return replace(folder, files=folder.files.take(others)), table
