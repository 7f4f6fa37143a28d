"""The protocol of all kinds of sources, and helpers that they share."""

import hashlib
import json
from dataclasses import dataclass
from typing import Protocol

from infra.machine.files import OnBytes
from infra.sources.mirrors import Mirrors
from infra.sources.raw_data import RawBucket, RawSource, read_record
from infra.storage.cache import Cache
from infra.storage.object_store import ObjectStore


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """The places that a download uses: the mirrors it reads, the bucket it fills, and the cache between them."""

    mirrors: Mirrors
    store: ObjectStore
    cache: Cache


class Source(Protocol):
    """A data set that was found but not fetched yet."""

    @property
    def name(self) -> str:
        """See RawSource.name."""

    @property
    def size(self) -> int | None:
        """Bytes that `fetch` reports to `on_bytes` in all; None if unknown."""

    @property
    def key(self) -> str | None:
        """Digest of the source's identity, if that is known without a fetch."""

    def fetch(self, place: Workplace, on_bytes: OnBytes, *, refresh: bool = False) -> RawSource:
        """Stores the files that are missing in the bucket.

        Args:
            on_bytes: called with progress, from any thread.
            refresh: fetch everything again.

        Raises:
            ServiceError: a mirror, a server or the bucket failed.
            UsageError: the user's files cannot be read, or are not of the kind that their names say.
        """


def reusable(source: Source, place: Workplace) -> RawSource | None:
    """Returns the record of an earlier download, or None if a file of it is missing or damaged in the bucket."""
    record = read_record(place.store, source.key) if source.key else None
    if record is None:
        return None
    bucket = RawBucket(place.store, place.cache, expected_files=len(record.files))
    return record.model_copy(update={"reused": True}) if bucket.holds_all(record.stored_files) else None


def source_key(*parts: object) -> str:
    """Returns a digest of what identifies a source; the parts must have a JSON form."""
    return hashlib.sha256(json.dumps(parts, separators=(",", ":")).encode()).hexdigest()
