"""Fetches a file from the first mirror that serves the promised content.

| scheme | the file at an address |
|---|---|
| `https:`, `http:` | a file of a web server |
| `s3://bucket/key` | an object in the same store as Convoy's bucket |
| `file:/path` | a local file |
| `deb:package/path` | a path inside a Debian package |
| `pypi:project==version/path#sha256=digest` | a path inside a wheel of pip's or uv's index, with its digest |
| `hf:owner/name@revision/file` | a file of a repository of the Hugging Face Hub; without a revision, the newest |
| `package:module/path` | a path inside an installed Python package |
"""

import gzip
import importlib.util
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar, cast
from urllib.parse import unquote

from infra.errors import ServiceError, UsageError
from infra.fetch.debian import apt_download, debian_file
from infra.fetch.hub import endpoint, hub_file
from infra.fetch.meter import Meter
from infra.fetch.packages import Downloads
from infra.fetch.web import CONNECT_SECONDS, Web, display
from infra.fetch.wheels import pip_download, wheel_file
from infra.machine.files import file_digest, temporary_file
from infra.sources.entries import CatalogueFile
from infra.storage.cache import Cache
from infra.storage.object_store import ObjectStore, parse_s3

SCHEMES = ("https:", "http:", "s3:", "file:", "deb:", "pypi:", "hf:", "package:")
SLACK_BYTES = 1 << 16  # by which compression may lengthen an incompressible file

T = TypeVar("T")


class Mirrors:
    """Fetches files by address during one download run; remembers dead hosts. Threads may share it."""

    def __init__(self, partial: Path, *, connect_seconds: float = CONNECT_SECONDS) -> None:
        """Opens no connection yet; the arguments are those of `Web`."""
        self._partial = partial
        self.web = Web(partial, connect_seconds=connect_seconds)
        self._debs, self._wheels = Downloads(apt_download), Downloads(pip_download)

    def __enter__(self) -> "Mirrors":
        return self

    def __exit__(self, *_: object) -> None:
        self.web.close()
        self._debs.close()
        self._wheels.close()

    def probe_hosts(self, addresses: Sequence[str]) -> None:
        """Starts checks of all web servers in the background, so that dead ones cost one timeout in total."""
        for address in addresses:
            if address.startswith(("http:", "https:")):
                self.web.probe_host(address)
            elif address.startswith("hf:"):
                self.web.probe_host(endpoint())

    @contextmanager
    def fetched(self, address: str, meter: Meter, limit: int | None = None) -> Iterator[Path]:
        """Yields a local file with the address's content, which must not be changed; temporary files are deleted.

        Args:
            limit: the largest accepted size in bytes; None for no limit.

        Raises:
            ServiceError: the reason why the file cannot be fetched, without the address.
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
                with debian_file(rest, self._debs) as path:
                    yield path
            case "pypi":
                with wheel_file(rest, self._wheels, limit) as path:
                    yield path
            case "hf":
                yield hub_file(rest, self.web)
            case "file":
                yield _readable(Path(unquote(rest[2:]) if rest.startswith("///") else rest))
            case "package":
                yield _readable(_inside_package(rest))
            case _:
                raise ServiceError(f"no such kind of address; known are {' '.join(SCHEMES)}")

    def version(self, address: str) -> tuple[str | None, int | None]:
        """Returns what tells the present version of a file from others, and its bytes; None for what is not known.

        Raises:
            UsageError: there is no such object.
            ServiceError: the server did not answer.
        """
        if address.startswith(("http:", "https:")):
            return self.web.version(address)
        if not address.startswith("s3:"):
            return None, None
        store, key = self.object(address)
        if (info := store.head(key)) is None:
            raise UsageError(f"{address}: there is no such object")
        return info.etag or None, info.size

    @contextmanager
    def _object(self, address: str, limit: int | None, meter: Meter) -> Iterator[Path]:
        store, key = self.object(address)
        info = store.head(key)
        if info is None:
            raise ServiceError("no such object")
        if limit is not None and info.size > limit:
            raise ServiceError(f"it holds {info.size} bytes, more than the {limit} expected")
        with temporary_file(self._partial) as path:
            store.get_file(key, path, on_progress=meter.byte_counter(info.size))
            yield path

    def object(self, address: str) -> tuple[ObjectStore, str]:
        """Returns the bucket, which must exist, and the key of `s3://bucket/key`."""
        bucket, key = parse_s3(address)
        return ObjectStore.connect(bucket, create=False), key


def addresses(file: CatalogueFile, dataset: str, mirrors: Sequence[str], first: str | None) -> list[str]:
    """Returns the addresses to try for a file, in order.

    Args:
        mirrors: the entry's base addresses.
        first: the user's mirror: a base address or a folder, with or without one sub-folder per data set.

    Raises:
        UsageError: the user's mirror has an unknown scheme.
    """
    return own_addresses(file.name, dataset, first) + [f"{base.rstrip('/')}/{file.name}" for base in mirrors]


def own_addresses(file: str, folder: str, mirror: str | None) -> list[str]:
    """Returns the addresses at which the user's mirror, if there is one, may have a file; see `addresses`."""
    base = _base(mirror) if mirror else ""
    return [f"{base}/{folder}/{file}", f"{base}/{file}"] if mirror else []


def obtain(file: CatalogueFile, places: Sequence[str], mirrors: Mirrors, cache: Cache, meter: Meter) -> tuple[str, str]:
    """Puts a file's content into the cache, from the first address that serves the right content.

    Returns:
        The content's SHA-256, and the address that served it.

    Raises:
        ServiceError: no address serves it; the message gives the reason for each.
    """
    limit = file.size + file.size // 100 + SLACK_BYTES
    accept = lambda path: _verified(path, file, cache)  # noqa: E731
    return first_served(file.name, ((place, limit, accept) for place in places), mirrors, meter)


def first_served(
    what: str, places: Iterable[tuple[str, int | None, Callable[[Path], T]]], mirrors: Mirrors, meter: Meter
) -> tuple[T, str]:
    """Fetches a file from the first place whose content is accepted.

    Args:
        what: the file's name, for the message.
        places: addresses, each with the largest accepted size in bytes, if any, and a function that takes the local
            file, or raises ServiceError if it has other content than promised.

    Returns:
        The function's result, and the address for messages.

    Raises:
        ServiceError: no place serves it; the message gives the reason for each.
    """
    problems = []
    for place, limit, accept in places:
        try:
            with mirrors.fetched(place, meter, limit) as path:
                accepted = accept(path)
        except ServiceError as error:
            problems.append(f"{display(place)} ({error})")
        else:
            meter.advance_to(1.0)
            return accepted, display(place)
    raise ServiceError(
        f"no mirror has {what}: {'; '.join(problems)}. Set CONVOY_MIRROR to a folder or an address that has it"
    )


def _verified(path: Path, file: CatalogueFile, cache: Cache) -> str:
    """Verifies a fetched file, and puts its content into the cache, unpacked up to the stated size."""
    if file.sha256 is None:
        _require_digest("MD5", file_digest(path, "md5"), str(file.md5))
    elif not file.packed:
        _require_digest("SHA-256", file_digest(path), file.sha256)
    try:
        with gzip.open(path) if file.packed else path.open("rb") as content:
            return cache.add_stream(cast(IO[bytes], content), sha256=file.sha256, size=file.size)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ServiceError(
            f"it is no whole gzip file: its SHA-256 is {file_digest(path)}, "
            f"expected content with SHA-256 {file.sha256 or 'unknown'}"
        ) from error


def _base(mirror: str) -> str:
    """Returns the base address of the user's mirror, which may be a folder."""
    if not mirror.startswith(SCHEMES):
        if "://" in mirror:
            raise UsageError(f"CONVOY_MIRROR: give a folder, or an address with one of {' '.join(SCHEMES)}")
        mirror = f"file:{Path(mirror).expanduser().absolute()}"
    return mirror.rstrip("/")


def _require_digest(algorithm: str, got: str, expected: str) -> None:
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
