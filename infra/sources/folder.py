"""A folder of images, local or in a bucket. Which of its files are images is not decided here."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from infra.errors import UsageError
from infra.fetch.meter import Meter
from infra.machine.files import OnBytes, file_digest, temporary_file
from infra.machine.threads import in_parallel
from infra.sources.base import Workplace, slug, source_key
from infra.sources.listing import Entry, Listing
from infra.sources.location import FolderLocation, LocalLocation, OnFiles, list_bucket, list_local
from infra.sources.raw_data import ListingRef, RawBucket, RawFile, RawSource, write_record
from infra.storage import bucket_layout
from infra.storage.object_store import ObjectStore

KEEP_FILES, KEEP_BYTES = 50_000, 16 * 2**30
"""A folder with more is read where it lies, if nobody says otherwise."""


@dataclass(frozen=True, kw_only=True)
class FolderSource:
    """See `infra.sources.base.Source`."""

    location: FolderLocation
    title: str
    """The folder's own name."""

    files: Listing
    folders: tuple[str, ...] = ()
    """Paths of all sub-folders, where they exist without files."""

    unreachable: tuple[str, ...] = ()
    """Paths of what was found and is no file: links that lead nowhere, say."""

    remarks: tuple[str, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)
    """See RawSource."""

    @property
    def name(self) -> str:
        return slug(self.title)

    @property
    def size(self) -> int:
        return self.files.bytes

    @property
    def is_large(self) -> bool:
        """Whether it had better be read in place than copied."""
        return len(self.files) > KEEP_FILES or self.size > KEEP_BYTES

    @property
    def key(self) -> str | None:
        if not self.location.marks_content or not all(file.version for file in self.files):
            return None
        files = [list(file) for file in self.files]
        return source_key("folder", self.location.address, files, *([self.remarks] if self.remarks else []))

    def only(
        self, positions: NDArray[np.int64], remarks: tuple[str, ...] = (), left_out: Mapping[str, int] | None = None
    ) -> "FolderSource":
        """Returns the same folder with these of its files only, in rising order.

        Args:
            remarks, left_out: what is said of the others; see RawSource.
        """
        return replace(self, files=self.files.take(positions), remarks=remarks, left_out=left_out or {})

    def fetch(self, place: Workplace, on_bytes: OnBytes, *, refresh: bool = False) -> RawSource:
        """Files are hashed, cached and uploaded side by side; equal ones are stored once."""
        bucket = RawBucket(place.store, place.cache, expected_files=len(self.files))
        stop = threading.Event()

        def bring(file: Entry) -> tuple[RawFile, bool]:
            meter = Meter(file.size, on_bytes, stop)
            meter.at(0.0)
            digest = self.location.add_to(place.cache, file.path)
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
            remarks=self.remarks,
            left_out=dict(self.left_out),
            served_by={".": self.location.address},
            reused=all(present for _, present in brought),
        )
        if self.key:
            write_record(place.store, self.key, source)
        return source

    def refer(self, place: Workplace, *, refresh: bool = False) -> RawSource:
        """Store the listing only: the files are read where they lie, whenever they are needed.

        Raises:
            ServiceError: the bucket failed.
            UsageError: files that cannot be told apart from changed ones, or be named.
        """
        if isinstance(self.location, LocalLocation) and (odd := next(iter(self.location.odd), None)):
            raise UsageError(f"{odd}: its name is not valid UTF-8; rename it, or set data.keep_raw=true")
        if unmarked := next((file.path for file in self.files if not file.version), None):
            raise UsageError(f"{unmarked}: the store gives it no ETag to know it by; set data.keep_raw=true")
        digest = source_key("listing", self.location.address, self.files.digest)
        key = bucket_layout.listing(digest)
        stored = None if refresh else place.store.head(key)
        sha256 = stored.sha256 if stored else None
        if sha256 is None:
            with temporary_file(place.cache.root) as temporary:
                self.files.save(temporary)
                sha256 = place.store.put_file(key, temporary, sha256=file_digest(temporary))
        listing = ListingRef(
            digest=digest, sha256=sha256, address=self.location.address, count=len(self.files), bytes=self.size
        )
        return RawSource(
            name=self.name,
            format="folder",
            files=(),
            listing=listing,
            remarks=self.remarks,
            left_out=dict(self.left_out),
            served_by={".": self.location.address},
            reused=stored is not None,
        )


def local_folder(root: Path, on_files: OnFiles = lambda count: None) -> FolderSource:
    """See `infra.sources.location.list_local`."""
    found = list_local(root, on_files)
    absolute = root.absolute()
    title = absolute.resolve().name if absolute.name in {"", ".."} else absolute.name
    return FolderSource(
        location=found.location, title=title, files=found.files, folders=found.folders, unreachable=found.unreachable
    )


def bucket_folder(store: ObjectStore, prefix: str, on_files: OnFiles = lambda count: None) -> FolderSource:
    """See `infra.sources.location.list_bucket`."""
    found = list_bucket(store, prefix, on_files)
    title = prefix.rstrip("/").rpartition("/")[2] or store.bucket
    return FolderSource(
        location=found.location, title=title, files=found.files, folders=found.folders, unreachable=found.unreachable
    )
