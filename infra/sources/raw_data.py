"""Raw data in the bucket: files under their own digests, and a record of each source's files."""

import hashlib
import json
from collections.abc import Iterable

from pydantic import Field, field_validator

from infra.machine.threads import in_parallel
from infra.records import Record
from infra.sources.entries import Format, Sha256
from infra.storage import bucket_layout
from infra.storage.cache import Cache
from infra.storage.object_store import ObjectStore

LIST_FROM = 200  # files; from here on one listing of the bucket is faster than a request per file


class RawFile(Record):
    """One file of a source."""

    path: str
    """Path in the source, with `/`: `train/cat/001.png`, `train-images-idx3-ubyte`."""

    sha256: Sha256
    size: int
    """Bytes."""

    @property
    def key(self) -> str:
        """Its object's key in the bucket."""
        return bucket_layout.raw_file(self.sha256)


class ListingRef(Record):
    """The listing, stored in the bucket, of a folder that is read in place."""

    digest: Sha256
    """Digest of the folder's address and of each file's path, size and version."""

    sha256: Sha256
    """SHA-256 of the stored object."""

    address: str
    """Address of the folder; see `infra.sources.location`."""

    count: int
    """Number of files."""

    bytes: int
    """Bytes of all files."""

    @property
    def key(self) -> str:
        """Its object's key in the bucket."""
        return bucket_layout.listing(self.digest)


class RawLabels(Record):
    """What a label table says of the files of a source, a row per file in the order of their paths."""

    file: RawFile
    """The table as Parquet; see `infra.sources.label_table.LabelTable`."""

    digest: Sha256
    """Digest of what decides a dataset version: paths, labels, splits and groups."""

    columns: tuple[str, ...]
    """Names of the further columns."""


class RawSource(Record):
    """The files of one source: all stored in the bucket, or only listed."""

    name: str
    """The catalogue's name, or one made from the folder's or archive's name, of `a-z 0-9 - _ .` only."""

    format: Format
    classes: tuple[str, ...] = ()
    """Names of the labels 0, 1, ...; empty if the files name them, or if the labels serve as names."""

    files: tuple[RawFile, ...]
    """Empty if there is a listing."""

    listing: ListingRef | None = None
    labels: RawLabels | None = None
    """The label table, if the source has one."""

    served_by: dict[str, str]
    """Origin of each file: path → address; a folder has one entry, under `.`."""

    remarks: tuple[str, ...] = ()
    """Sentences about files that were left out of a folder; empty for an archive, which is stored whole."""

    left_out: dict[str, int] = Field(default_factory=dict)
    """Number of files left out, per class folder that lost any."""

    reused: bool = False
    """Whether nothing had to be fetched or stored."""

    @field_validator("files")
    @classmethod
    def _distinct(cls, files: tuple[RawFile, ...]) -> tuple[RawFile, ...]:
        if len({file.path for file in files}) != len(files):
            raise ValueError("two files of the source have the same path")
        return tuple(sorted(files, key=lambda file: file.path))

    @property
    def stored_files(self) -> tuple[RawFile, ...]:
        """The files and the label table."""
        return (*self.files, self.labels.file) if self.labels else self.files

    @property
    def digest(self) -> str:
        """SHA-256 of format, files or listing, labels, and what was left out; independent of the origin of files."""
        content: dict[str, object] = {"format": self.format}
        if self.remarks:
            content |= {"remarks": self.remarks, "left_out": self.left_out}
        if self.labels:
            content["labels"] = self.labels.digest
        if self.listing:
            if len(content) == 1:
                return self.listing.digest
            content["listing"] = self.listing.digest
        content["files"] = [[file.path, file.sha256, file.size] for file in self.files]
        return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


class RawBucket:
    """Checks which raw files the bucket holds undamaged, and uploads others from the cache."""

    def __init__(self, store: ObjectStore, cache: Cache, *, expected_files: int) -> None:
        self._store = store
        self._cache = cache
        self._listed: dict[str, int] | None = None
        if expected_files >= LIST_FROM:
            self._listed = {info.key: info.size for info in store.list(bucket_layout.RAW)}

    def holds(self, file: RawFile) -> bool:
        """Checks by size and stored digest whether the bucket holds the file undamaged."""
        if self._listed is not None:
            return self._listed.get(file.key) == file.size
        info = self._store.head(file.key)
        return info is not None and info.size == file.size and info.sha256 in {None, file.sha256}

    def holds_all(self, files: Iterable[RawFile]) -> bool:
        """Checks all files in parallel; see `holds`."""
        return all(in_parallel(self.holds, files))

    def put(self, file: RawFile) -> None:
        """Uploads a file from the cache."""
        self._store.put_file(file.key, self._cache.path(file.sha256), sha256=file.sha256)


def read_record(store: ObjectStore, source_key: str) -> RawSource | None:
    """Returns the record of an earlier download, or None; its files may have been damaged or deleted since."""
    remedy = "fetch the data again with --refresh download"
    return store.read_record(bucket_layout.source_record(source_key), RawSource, remedy)


def write_record(store: ObjectStore, source_key: str | None, source: RawSource) -> None:
    """Commits a download, so that later ones find its record, and `convoy prune` keeps its files.

    Args:
        source_key: of the version that was found; None if the source shows no versions, or has changed since.
    """
    record = bucket_layout.source_record(source_key or source.digest)
    store.put_bytes(record, source.model_dump_json(exclude={"reused", "listing"}).encode())
