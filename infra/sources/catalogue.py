"""A data set of the catalogue, fetched from the first mirror that has it."""

import threading
from dataclasses import dataclass

from infra.errors import ServiceError
from infra.fetch.meter import Meter
from infra.machine.files import OnBytes, file_digest
from infra.machine.locks import locked
from infra.machine.threads import in_parallel
from infra.sources.base import Workplace, reusable
from infra.sources.entries import CatalogueEntry, CatalogueFile
from infra.sources.mirrors import addresses, obtain
from infra.sources.raw_data import RawBucket, RawFile, RawSource, read_record, write_record


@dataclass(frozen=True)
class CatalogueSource:
    """A data set of the catalogue; see `infra.sources.base.Source`."""

    entry: CatalogueEntry
    own_mirror: str | None = None
    """The user's mirror, tried first: a folder, or an address of any scheme in `infra.sources.mirrors`."""

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def size(self) -> int:
        return self.entry.size

    @property
    def key(self) -> str:
        return self.entry.digest

    def fetch(self, place: Workplace, on_bytes: OnBytes, *, refresh: bool = False) -> RawSource:
        """Fetches in parallel the files that are missing or damaged in the bucket.

        On one machine only one process fetches a data set; others wait, and then find its files in the bucket.
        """
        with locked(place.cache.root / "locks" / f"source-{self.key}"):
            if not refresh and (known := reusable(self, place)):
                return known
            place.mirrors.probe_hosts([self.own_mirror or "", *self.entry.mirrors])
            known = None if refresh else read_record(place.store, self.key)
            stop = threading.Event()

            def store(file: CatalogueFile) -> tuple[RawFile, str]:
                meter = Meter(file.size, on_bytes, stop)
                stored = None if refresh else self._stored_before(file, known, place)
                stored = stored or self._fetched(file, place, meter)
                meter.advance_to(1.0)
                return stored

            try:
                results = in_parallel(store, self.entry.files, stop)
            except ServiceError as error:
                raise ServiceError(f"{self.name}: {error}") from error
            source = RawSource(
                name=self.name,
                format=self.entry.format,
                classes=self.entry.classes,
                files=tuple(raw for raw, _ in results),
                served_by={raw.path: origin for raw, origin in results},
            )
            write_record(place.store, self.key, source)
            return source

    def _stored_before(
        self, file: CatalogueFile, known: RawSource | None, place: Workplace
    ) -> tuple[RawFile, str] | None:
        """Returns a file that the bucket holds, or that can be uploaded from the cache, with its origin."""
        before = next((raw for raw in known.files if raw.path == file.path), None) if known else None
        digest = before.sha256 if before else file.sha256
        if digest is None:
            return None
        raw = RawFile(path=file.path, sha256=digest, size=file.size)
        bucket = RawBucket(place.store, place.cache, expected_files=1)
        if bucket.holds(raw):
            origin = place.store.uri(raw.key)
        elif place.cache.holds(digest, file.size) and file_digest(place.cache.path(digest)) == digest:
            bucket.put(raw)
            origin = "cache"
        else:
            return None
        return raw, known.served_by.get(file.path, origin) if known else origin

    def _fetched(self, file: CatalogueFile, place: Workplace, meter: Meter) -> tuple[RawFile, str]:
        tried = addresses(file, self.name, self.entry.mirrors, self.own_mirror)
        digest, origin = obtain(file, tried, place.mirrors, place.cache, meter)
        raw = RawFile(path=file.path, sha256=digest, size=file.size)
        RawBucket(place.store, place.cache, expected_files=1).put(raw)
        return raw, origin
