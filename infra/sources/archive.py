"""An archive of class folders, local or at an address; it is stored unchanged."""

import bz2
import gzip
import lzma
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from infra.errors import ServiceError, UsageError
from infra.fetch.meter import Meter
from infra.fetch.web import display
from infra.machine.files import OnBytes
from infra.sources.base import Workplace, source_key
from infra.sources.entries import stem
from infra.sources.raw_data import RawBucket, RawFile, RawSource, write_record
from infra.sources.slug import slug


@dataclass(frozen=True)
class ArchiveSource:
    """An archive; see `infra.sources.base.Source`."""

    address: str
    file: str
    """The file's name."""

    size: int | None
    version: str | None = None
    """The server's ETag or date of this version; None if it has none, so that only reading tells versions apart."""

    @property
    def name(self) -> str:
        return slug(stem(self.file))

    @property
    def key(self) -> str | None:
        return source_key("archive", display(self.address), self.version) if self.version else None

    def fetch(self, place: Workplace, on_bytes: OnBytes, *, refresh: bool = False) -> RawSource:
        """Fetches and stores the archive; a later call finds its record only if its server tells versions apart."""
        where = display(self.address)
        meter = Meter(self.size or 0, on_bytes)
        try:
            with place.mirrors.fetched(self.address, meter) as path:
                if not (zipfile.is_zipfile(path) if self.file.lower().endswith(".zip") else _is_tar(path)):
                    raise UsageError(f"{where}: this is no whole archive of the kind that its name says")
                digest = place.cache.add_file(path)
        except ServiceError as error:
            raise ServiceError(f"{where}: {error}") from error
        raw = RawFile(path=self.file, sha256=digest, size=place.cache.path(digest).stat().st_size)
        bucket = RawBucket(place.store, place.cache, expected_files=1)
        reused = not refresh and bucket.holds(raw)
        if not reused:
            bucket.put(raw)
        meter.advance_to(1.0)
        source = RawSource(name=self.name, format="archive", files=(raw,), served_by={raw.path: where}, reused=reused)
        write_record(place.store, self.key if self.key and self._is_as_found(place) else None, source)
        return source

    def _is_as_found(self, place: Workplace) -> bool:
        """Returns whether the server still has the version that was found; otherwise a record would confuse the two."""
        try:
            return place.mirrors.version(self.address)[0] == self.version
        except (ServiceError, UsageError):
            return False


def _is_tar(path: Path) -> bool:
    """Checks the first block only: tarfile's own test reads headers of any size into memory."""
    for opened in (open, gzip.open, bz2.open, lzma.open):
        try:
            with opened(path, "rb") as file:
                tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            return True  # an empty archive
        except (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError):
            continue
        return True
    return False
