"""What all kinds of sources have in common."""

import hashlib
import json
import re
import unicodedata
from dataclasses import dataclass
from typing import Protocol

from infra.machine.files import OnBytes
from infra.sources.mirrors import Mirrors
from infra.sources.raw_data import RawBucket, RawSource, read_record
from infra.storage.cache import Cache
from infra.storage.object_store import ObjectStore


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """Where files come from, go to, and pass through."""

    mirrors: Mirrors
    store: ObjectStore
    cache: Cache


class Source(Protocol):
    """A data set that was found, but not fetched yet."""

    @property
    def name(self) -> str:
        """See RawSource.name."""

    @property
    def size(self) -> int | None:
        """Bytes that `on_bytes` will be told of; None if unknown."""

    @property
    def key(self) -> str | None:
        """Digest of what makes it this data set, if that is known without fetching it."""

    def fetch(self, place: Workplace, on_bytes: OnBytes, *, refresh: bool = False) -> RawSource:
        """Bring what is missing into the bucket.

        Args:
            on_bytes: told of progress, from any thread.
            refresh: fetch everything anew, whatever is there.

        Raises:
            ServiceError: a mirror, a server or the bucket failed.
            UsageError: the user's files cannot be read, or are not what their names say.
        """


def reusable(source: Source, place: Workplace) -> RawSource | None:
    """The source as an earlier download left it in the bucket, if all its files are still there, whole."""
    record = read_record(place.store, source.key) if source.key else None
    if record is None:
        return None
    bucket = RawBucket(place.store, place.cache, expected_files=len(record.files))
    return record.model_copy(update={"reused": True}) if bucket.holds_all(record.files) else None


def source_key(*parts: object) -> str:
    """Digest of what identifies a source; the parts must have a JSON form."""
    return hashlib.sha256(json.dumps(parts, separators=(",", ":")).encode()).hexdigest()


def slug(name: str) -> str:
    """Returns a name for runs and models, which may not hold `/` or `:`: lower case, of `a-z 0-9 - _ .`.

    Accents are dropped. A name with other letters or symbols that cannot be kept gets a short digest of the whole,
    so that no two of them share a model.
    """
    spelt = unicodedata.normalize("NFKD", name)
    plain = spelt.encode("ascii", "ignore").decode().lower()
    plain = re.sub(r"[^a-z0-9_.]+", "-", plain).strip("-.") or "dataset"
    if any(not c.isascii() and unicodedata.category(c)[0] in "LNS" for c in spelt):
        plain += "-" + hashlib.sha256(spelt.encode(errors="backslashreplace")).hexdigest()[:8]
    return plain
