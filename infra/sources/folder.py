"""A folder, local or in a bucket. Other modules decide which of its files are images."""

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
from infra.sources.base import Workplace, source_key
from infra.sources.label_table import LabelTable
from infra.sources.listing import Entry
from infra.sources.location import FolderListing, LocalLocation, OnFiles, list_bucket, list_local
from infra.sources.raw_data import ListingRef, RawBucket, RawFile, RawLabels, RawSource, write_record
from infra.sources.slug import slug
from infra.storage import bucket_layout
from infra.storage.object_store import ObjectStore

COPIED_FILES, COPIED_BYTES = 50_000, 16 * 2**30
"""Limits of a folder that is copied by default; a larger one is read in place."""


@dataclass(frozen=True, kw_only=True)
class FolderSource(FolderListing):
    """A folder of images; see `infra.sources.base.Source`."""

    title: str
    """The folder's own name."""

    labels: LabelTable | None = None
    """What a table says of the files, a row per file."""

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
        """Whether the folder is read in place by default."""
        return len(self.files) > COPIED_FILES or self.size > COPIED_BYTES

    @property
    def key(self) -> str | None:
        if not self.location.marks_content or not all(file.version for file in self.files):
            return None
        further: list[object] = [self.remarks] if self.remarks else []
        if self.labels:
            further.append(self.labels.full_digest)
        return source_key("folder", self.location.address, list(self.files), *further)

    def only(
        self, positions: NDArray[np.int64], remarks: tuple[str, ...] = (), left_out: Mapping[str, int] | None = None
    ) -> "FolderSource":
        """Returns the folder with the files at these positions only, which must ascend.

        Args:
            remarks, left_out: notes about the other files; see RawSource.
        """
        labels = self.labels and self.labels.take(positions)
        files = self.files.take(positions)
        return replace(self, files=files, labels=labels, remarks=remarks, left_out=left_out or {})

    def fetch(self, place: Workplace, on_bytes: OnBytes, *, refresh: bool = False) -> RawSource:
        """Hashes, caches and uploads the files in parallel; equal files are stored once."""
        bucket = RawBucket(place.store, place.cache, expected_files=len(self.files))
        stop = threading.Event()

        def store(file: Entry) -> tuple[RawFile, bool, bool]:
            meter = Meter(file.size, on_bytes, stop)
            meter.advance_to(0.0)
            digest, version = self.location.add_to(place.cache, file.path)
            raw = RawFile(path=file.path, sha256=digest, size=place.cache.path(digest).stat().st_size)
            present = not refresh and bucket.holds(raw)
            if not present:
                bucket.put(raw)
            meter.advance_to(1.0)
            return raw, present, version == file.version

        results = in_parallel(store, self.files, stop)
        files = tuple(raw for raw, _, _ in results)
        labels = self._store_labels(place)
        source = self._raw_source(files, None, labels, reused=all(present for _, present, _ in results))
        write_record(place.store, self.key if all(as_listed for _, _, as_listed in results) else None, source)
        return source

    def refer(self, place: Workplace, *, refresh: bool = False) -> RawSource:
        """Stores only the listing; the files are read in place whenever they are needed.

        Raises:
            ServiceError: the bucket failed.
            UsageError: a file has no version that shows a change, or a name that is not valid UTF-8.
        """
        if isinstance(self.location, LocalLocation) and (path := next(iter(self.location.not_utf8), None)):
            raise UsageError(f"{path}: its name is not valid UTF-8; rename it, or set data.keep_raw=true")
        if unmarked := next((file.path for file in self.files if not file.version), None):
            raise UsageError(
                f"{unmarked}: the store gives it no ETag, which would show a change; set data.keep_raw=true"
            )
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
        return self._raw_source((), listing, self._store_labels(place), reused=stored is not None)

    def _store_labels(self, place: Workplace) -> RawLabels | None:
        if self.labels is None:
            return None
        with temporary_file(place.cache.root) as temporary:
            self.labels.save(temporary)
            sha256 = place.cache.add_file(temporary)
        file = RawFile(path="labels.parquet", sha256=sha256, size=place.cache.path(sha256).stat().st_size)
        bucket = RawBucket(place.store, place.cache, expected_files=1)
        if not bucket.holds(file):
            bucket.put(file)
        return RawLabels(file=file, digest=self.labels.digest, columns=self.labels.columns)

    def _raw_source(
        self, files: tuple[RawFile, ...], listing: ListingRef | None, labels: RawLabels | None, *, reused: bool
    ) -> RawSource:
        return RawSource(
            name=self.name,
            format="folder",
            files=files,
            listing=listing,
            labels=labels,
            remarks=self.remarks,
            left_out=dict(self.left_out),
            served_by={".": self.location.address},
            reused=reused,
        )


def local_folder(root: Path, on_files: OnFiles = lambda count: None) -> FolderSource:
    """Returns a folder of this machine; see `infra.sources.location.list_local`."""
    listed = list_local(root, on_files)
    absolute = root.absolute()
    return FolderSource(title=absolute.resolve().name if absolute.name in {"", ".."} else absolute.name, **vars(listed))


def bucket_folder(store: ObjectStore, prefix: str, on_files: OnFiles = lambda count: None) -> FolderSource:
    """Returns the objects under a prefix as a folder; see `infra.sources.location.list_bucket`."""
    listed = list_bucket(store, prefix, on_files)
    return FolderSource(title=prefix.rstrip("/").rpartition("/")[2] or store.bucket, **vars(listed))
