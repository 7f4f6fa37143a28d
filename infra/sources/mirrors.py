"""Where a file may be had, by address; and taking one only if it is what was promised.

| scheme | a file's address |
|---|---|
| `https:`, `http:` | as usual |
| `s3://bucket/key` | an object in the same store as Convoy's bucket |
| `file:/path` | a local file |
| `deb:package/path` | a path inside a Debian package |
| `package:module/path` | a path inside an installed Python package |
"""

import gzip
import importlib.util
import os
import tempfile
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast
from urllib.parse import unquote

from infra.errors import ServiceError, UsageError
from infra.fetch.debian import Debian
from infra.fetch.meter import Meter
from infra.fetch.web import CONNECT_SECONDS, Web, display
from infra.machine.files import file_digest
from infra.sources.entries import CatalogueFile
from infra.storage.cache import Cache
from infra.storage.object_store import ObjectStore, parse_s3

SCHEMES = ("https:", "http:", "s3:", "file:", "deb:", "package:")
SLACK = 1 << 16  # bytes by which compression may lengthen a file that does not compress


class Mirrors:
    """Opens addresses during one download run; knows which hosts are dead. Safe to share between threads."""

    def __init__(self, partial: Path, *, connect_seconds: float = CONNECT_SECONDS) -> None:
        """Contact nobody yet.

        Args:
            partial: folder for unfinished files.
            connect_seconds: how long one attempt to reach a web server may take.
        """
        self._partial = partial
        self._buckets: dict[str, ObjectStore] = {}
        self._lock = threading.Lock()
        self.web = Web(partial, connect_seconds=connect_seconds)
        self._debian = Debian()

    def __enter__(self) -> "Mirrors":
        return self

    def __exit__(self, *_: object) -> None:
        self.web.close()
        self._debian.close()

    def knock(self, addresses: Sequence[str]) -> None:
        """Find out in the background which web servers answer: dead ones cost their time together."""
        for address in addresses:
            if address.startswith(("http:", "https:")):
                self.web.knock(address)

    def bucket(self, name: str) -> ObjectStore:
        """A bucket that must exist already."""
        with self._lock:
            if name not in self._buckets:
                self._buckets[name] = ObjectStore.connect(name, create=False)
            return self._buckets[name]

    @contextmanager
    def fetched(self, address: str, meter: Meter, limit: int | None = None) -> Iterator[Path]:
        """Yield a local file with the address's content, only to be read; a temporary one is removed at the
        end.

        Args:
            limit: most bytes to accept; None for no limit.

        Raises:
            ServiceError: why it cannot be had, without the address.
        """
        scheme, _, rest = address.partition(":")
        match scheme:
            case "http" | "https":
                with self.web.fetched(address, limit, meter) as path:
                    yield path
            case "s3":
                with self._object(address, limit, meter) as path:
                    yield path
            case "deb":
                with self._debian.fetched(rest) as path:
                    yield path
            case "file":
                yield _readable(Path(unquote(rest[2:]) if rest.startswith("//") else rest))
            case "package":
                yield _readable(_inside_package(rest))
            case _:
                raise ServiceError(f"no such kind of address; known are {' '.join(SCHEMES)}")

    @contextmanager
    def _object(self, address: str, limit: int | None, meter: Meter) -> Iterator[Path]:
        store, key = self.object(address)
        info = store.head(key)
        if info is None:
            raise ServiceError("no such object")
        if limit is not None and info.size > limit:
            raise ServiceError(f"it holds {info.size} bytes, more than the {limit} expected")
        self._partial.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._partial) as folder:
            path = Path(folder, "object")
            store.get_file(key, path, on_progress=meter.adding_up(info.size))
            yield path

    def object(self, address: str) -> tuple[ObjectStore, str]:
        """Bucket and key of `s3://bucket/key`."""
        bucket, key = parse_s3(address)
        return self.bucket(bucket), key


def addresses(file: CatalogueFile, dataset: str, mirrors: Sequence[str], first: str | None) -> list[str]:
    """Where to look for a file, in order.

    Args:
        mirrors: the entry's base addresses.
        first: the user's own mirror: a base address or a folder, with one sub-folder a data set or none.

    Raises:
        UsageError: the user's mirror is of no known kind.
    """
    own = []
    if first:
        base = _base(first)
        own = [f"{base}/{dataset}/{file.name}", f"{base}/{file.name}"]
    return own + [f"{base.rstrip('/')}/{file.name}" for base in mirrors]


def obtain(file: CatalogueFile, places: Sequence[str], mirrors: Mirrors, cache: Cache, meter: Meter) -> tuple[str, str]:
    """Put a file's content into the cache, from the first place that has the right one.

    Returns:
        The content's SHA-256, and the address that served it.

    Raises:
        ServiceError: no place has it; the message lists each with its reason.
    """
    problems = []
    for place in places:
        try:
            with mirrors.fetched(place, meter, limit=file.size + file.size // 100 + SLACK) as path:
                digest = _admit(path, file, cache)
        except ServiceError as error:
            problems.append(f"{display(place)} ({error})")
        else:
            meter.at(1.0)
            return digest, display(place)
    raise ServiceError(
        f"no mirror has {file.name}: {'; '.join(problems)}. Set CONVOY_MIRROR to a folder or an address that has it"
    )


def _admit(path: Path, file: CatalogueFile, cache: Cache) -> str:
    """Verify a fetched file, unpack it within its stated size, and put the content into the cache."""
    if file.sha256 is None:
        _require("MD5", file_digest(path, "md5"), str(file.md5))
    elif not file.packed:
        _require("SHA-256", file_digest(path), file.sha256)
    try:
        with gzip.open(path) if file.packed else path.open("rb") as content:
            return cache.add_stream(cast(IO[bytes], content), sha256=file.sha256, size=file.size)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ServiceError(
            f"it is no whole gzip file: the SHA-256 of what came is {file_digest(path)}, "
            f"expected was a content of {file.sha256 or 'unknown digest'}"
        ) from error


def _base(mirror: str) -> str:
    """The base address of the user's own mirror, which may be a folder."""
    if not mirror.startswith(SCHEMES):
        if "://" in mirror:
            raise UsageError(f"CONVOY_MIRROR: give a folder, or an address with one of {' '.join(SCHEMES)}")
        mirror = f"file:{Path(mirror).expanduser().absolute()}"
    return mirror.rstrip("/")


def _require(algorithm: str, got: str, expected: str) -> None:
    if got != expected:
        raise ServiceError(f"its {algorithm} is {got}, expected {expected}")


def _readable(path: Path) -> Path:
    if not path.is_file():
        raise ServiceError("no such file")
    if not os.access(path, os.R_OK):
        raise ServiceError("permission denied")
    return path


def _inside_package(address: str) -> Path:
    module, _, inside = address.partition("/")
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ServiceError(f"the Python package {module} is not installed")
    return Path(spec.submodule_search_locations[0], inside)
