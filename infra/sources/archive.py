"""An archive of class sub-folders, local or at an address; it is kept as it is."""

import bz2
import gzip
import lzma
import tarfile
import threading
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from infra.errors import ServiceError, UsageError
from infra.fetch.meter import Meter
from infra.fetch.web import display
from infra.machine.files import OnBytes
from infra.sources.base import Workplace, slug, source_key
from infra.sources.entries import ARCHIVES
from infra.sources.raw_data import RawBucket, RawFile, RawSource, write_record


@dataclass(frozen=True)
class ArchiveSource:
    """See `infra.sources.base.Source`."""

    address: str
    file: str
    """Its file name."""

    size: int | None
    version: str | None = None
    """The server's mark of this version of it; None: it has to be read to be known."""

    @property
    def name(self) -> str:
        suffix = next(suffix for suffix in ARCHIVES if self.file.lower().endswith(suffix))
        return slug(self.file[: -len(suffix)])

    @property
    def key(self) -> str | None:
        return source_key("archive", display(self.address), self.version) if self.version else None

    def fetch(self, place: Workplace, on_bytes: OnBytes, *, refresh: bool = False) -> RawSource:
        """The record is written only for an archive whose server tells versions apart."""
        where = display(self.address)
        meter = Meter(self.size or 0, on_bytes, threading.Event())
        try:
            with place.mirrors.fetched(self.address, meter) as path:
                if not (zipfile.is_zipfile(path) if self.file.lower().endswith(".zip") else _is_tar(path)):
                    raise UsageError(f"{where}: this is no whole archive of the kind its name says")
                digest = place.cache.add_file(path)
        except ServiceError as error:
            raise ServiceError(f"{where}: {error}") from error
        raw = RawFile(path=self.file, sha256=digest, size=place.cache.path(digest).stat().st_size)
        bucket = RawBucket(place.store, place.cache, expected_files=1)
        reused = not refresh and bucket.holds(raw)
        if not reused:
            bucket.put(raw)
        meter.at(1.0)
        source = RawSource(name=self.name, format="archive", files=(raw,), served_by={raw.path: where}, reused=reused)
        if self.key:
            write_record(place.store, self.key, source)
        return source


def _is_tar(path: Path) -> bool:
    """Looks at the first block only: tarfile's own test reads headers of any size into memory."""
    for opened in (open, gzip.open, bz2.open, lzma.open):
        try:
            with opened(path, "rb") as file:
                tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            return True  # an empty one
        except (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError):
            continue
        return True
    return False
