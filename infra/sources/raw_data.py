"""Raw data as it lies in the bucket: files under their own digests, and a record of each source's files."""

import hashlib
import json
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from infra.errors import ServiceError
from infra.machine.threads import in_parallel
from infra.sources.entries import Format, Sha256
from infra.storage import bucket_layout
from infra.storage.cache import Cache
from infra.storage.object_store import ObjectMissing, ObjectStore

LIST_FROM = 200  # files from which one listing of the bucket is quicker than a question for each


class RawFile(BaseModel):
    """One source file."""

    model_config = ConfigDict(frozen=True)

    path: str
    """Relative, with `/`, as the source has it: `train/cat/001.png`, `train-images-idx3-ubyte`."""

    sha256: Sha256
    size: int
    """Bytes."""

    @property
    def key(self) -> str:
        """Its object's key in the bucket."""
        return bucket_layout.raw_file(self.sha256)


class ListingRef(BaseModel):
    """The listing in the bucket of a folder that is read where it lies."""

    model_config = ConfigDict(frozen=True)

    digest: Sha256
    """Of the folder's address and of each file's path, size and version."""

    sha256: Sha256
    """Of the object."""

    address: str
    """Of the folder; see `infra.sources.location`."""

    count: int
    """Files."""

    bytes: int
    """Of all files."""

    @property
    def key(self) -> str:
        """Its object's key in the bucket."""
        return bucket_layout.listing(self.digest)


class RawSource(BaseModel):
    """The files of one source: all of them in the bucket, or a listing of them."""

    model_config = ConfigDict(frozen=True)

    name: str
    """The catalogue's name, or one made of the folder's or archive's name: of `a-z 0-9 - _ .` only."""

    format: Format
    classes: tuple[str, ...] = ()
    """Names of the labels 0, 1, ...; empty where the files name them, or the labels are their own names."""

    files: tuple[RawFile, ...]
    """Empty where there is a listing."""

    listing: ListingRef | None = None
    served_by: dict[str, str]
    """Where each file came from: path → address; a local or remote folder is named once, under `.`."""

    remarks: tuple[str, ...] = ()
    """What was left out of a folder, in words; empty for an archive, which is kept whole."""

    left_out: dict[str, int] = {}
    """Files left out of each class folder that lost any."""

    reused: bool = False
    """True if nothing had to be fetched or stored."""

    @field_validator("files")
    @classmethod
    def _distinct(cls, files: tuple[RawFile, ...]) -> tuple[RawFile, ...]:
        if len({file.path for file in files}) != len(files):
            raise ValueError("two files of the source have the same path")
        return tuple(sorted(files, key=lambda file: file.path))

    @property
    def digest(self) -> str:
        """SHA-256 of format, files and what was left out: equal for equal content, wherever it came from; or of the
        listing."""
        content: dict[str, object] = {"format": self.format}
        if self.remarks:
            content |= {"remarks": self.remarks, "left_out": self.left_out}
        if self.listing:
            if not self.remarks:
                return self.listing.digest
            content["listing"] = self.listing.digest
        content["files"] = [[file.path, file.sha256, file.size] for file in self.files]
        return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


class RawBucket:
    """The raw files in the bucket: which are there, whole, and putting the others there from the cache."""

    def __init__(self, store: ObjectStore, cache: Cache, *, expected_files: int) -> None:
        self._store = store
        self._cache = cache
        self._listed: dict[str, int] | None = None
        if expected_files >= LIST_FROM:
            self._listed = {info.key: info.size for info in store.list(bucket_layout.RAW)}

    def holds(self, file: RawFile) -> bool:
        """Whether its object is there and, by size and noted digest, undamaged."""
        if self._listed is not None:
            return self._listed.get(file.key) == file.size
        info = self._store.head(file.key)
        return info is not None and info.size == file.size and info.sha256 in {None, file.sha256}

    def holds_all(self, files: Iterable[RawFile]) -> bool:
        """`holds`, of all of them, asked side by side."""
        return all(in_parallel(self.holds, files))

    def put(self, file: RawFile) -> None:
        """Upload from the cache."""
        self._store.put_file(file.key, self._cache.path(file.sha256), sha256=file.sha256)


def read_record(store: ObjectStore, source_key: str) -> RawSource | None:
    """The record of an earlier download, or None; its files may be damaged or gone since."""
    key = bucket_layout.source_record(source_key)
    try:
        return RawSource.model_validate_json(store.get_bytes(key))
    except ObjectMissing:
        return None
    except ValidationError as error:
        raise ServiceError(f"{store.uri(key)} is damaged; fetch the data anew with --refresh download") from error


def write_record(store: ObjectStore, source_key: str, source: RawSource) -> None:
    """Commit a download: from now on it is found again."""
    store.put_bytes(
        bucket_layout.source_record(source_key), source.model_dump_json(exclude={"reused", "listing"}).encode()
    )
