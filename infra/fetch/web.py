"""Fetches files from web servers: resumes cut transfers, and gives up a dead host quickly, once for all files."""

import hashlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

import httpx

from infra.errors import ServiceError, UsageError, one_line, without_login
from infra.fetch.meter import Meter
from infra.machine.locks import locked
from infra.web_settings import WebTransport, certificates, proxy_of

CONNECT_SECONDS = 3.0
READ_SECONDS = 15.0
TRIES = 2  # in a row without a new byte
MAX_TRANSFERS = 20  # of one file
IDENTITY = {"Accept-Encoding": "identity"}  # digests are of the file, not of a proxy's compressed copy


def display(url: str) -> str:
    """Returns the address for messages and logs: without user, password, signed parameters and digest."""
    if not url.startswith(("http:", "https:")):
        return url.partition("#sha256=")[0]
    return urlunsplit(urlsplit(without_login(url))._replace(query="", fragment=""))


def file_name(url: str) -> str:
    """Returns the last part of the address's path."""
    return unquote(urlsplit(url).path.rpartition("/")[2])


class Web:
    """A client for one download run; remembers which hosts do not answer. Threads may share it."""

    def __init__(self, partial: Path, *, connect_seconds: float = CONNECT_SECONDS) -> None:
        """Opens no connection yet.

        Args:
            partial: folder of unfinished files, which a later run continues.
            connect_seconds: timeout of one attempt to connect.
        """
        self._partial = partial
        self._connect_seconds = connect_seconds
        self._hosts: dict[str, Future[str]] = {}
        self._lock = threading.Lock()
        self._client = httpx.Client(
            transport=WebTransport(),
            timeout=httpx.Timeout(READ_SECONDS, connect=connect_seconds, pool=None),
            follow_redirects=True,
        )

    def close(self) -> None:
        """Closes all connections."""
        self._client.close()

    def version(self, url: str) -> tuple[str | None, int | None]:
        """Returns the ETag or date of the file's present version, and its bytes; None for what is not known.

        Raises:
            ServiceError: the server did not answer.
        """
        try:
            self.require_host(url)
            answer = self._client.head(url, headers=IDENTITY)
        except (httpx.HTTPError, ServiceError) as error:
            raise ServiceError(f"{display(url)}: {_reason(error)}") from error
        if answer.status_code != 200:
            return None, None  # it may refuse only HEAD, as signed addresses do
        return _strong_validator(answer), int(answer.headers.get("content-length", 0)) or None

    @contextmanager
    def fetched(self, url: str, limit: int | None, meter: Meter) -> Iterator[Path]:
        """Yields a local file with the content of `url`; deletes it at the end, also if the caller rejects it.

        A cut transfer resumes where it stopped, in this run or the next one, if ETag or date show that the file on the
        server is unchanged.

        Args:
            limit: the largest accepted size in bytes; None for no limit.

        Raises:
            ServiceError: the reason why the file cannot be fetched.
        """
        self.require_host(url)
        partial = self._partial / hashlib.sha256(display(url).encode()).hexdigest()
        with locked(partial.with_suffix(".lock")):  # another process may want the same file
            self._complete(url, partial, limit, meter)
            try:
                yield partial
            finally:
                _discard(partial)

    def _complete(self, url: str, partial: Path, limit: int | None, meter: Meter) -> None:
        """Transfers until the file is complete; gives up after TRIES transfers in a row without a new byte."""
        fruitless = 0
        for transfers in range(1, MAX_TRANSFERS + 1):
            before = _size(partial)
            try:
                return self._transfer(url, partial, limit, meter)
            except (httpx.TransportError, _TryAgain) as error:
                fruitless = 0 if _size(partial) > before else fruitless + 1
                if fruitless == TRIES or transfers == MAX_TRANSFERS:
                    raise ServiceError(f"{_reason(error)} ({transfers} tries)") from error
                time.sleep(0.2 * fruitless)
            except httpx.HTTPError as error:  # such as a redirect loop
                raise ServiceError(_reason(error)) from error

    def _transfer(self, url: str, partial: Path, limit: int | None, meter: Meter) -> None:
        """Sends one request, for the whole file or for the missing part."""
        offset, validator_file = _size(partial), _validator_file(partial)
        expected = validator_file.read_text() if offset and validator_file.exists() else None
        headers = {"Range": f"bytes={offset}-", "If-Range": expected} if expected else {}
        with self._client.stream("GET", url, headers=IDENTITY | headers) as answer:
            validator, part = _strong_validator(answer), answer.headers.get("content-range", "")
            if answer.status_code == 416 and part == f"bytes */{offset}":
                return  # nothing is missing
            if answer.status_code == 416 or (
                answer.status_code == 206
                and not (part.startswith(f"bytes {offset}-") and validator in {None, expected})
            ):
                _discard(partial)
                raise _TryAgain("the server's file has changed")
            _require_success(answer)
            if answer.status_code == 200:
                offset = 0
            validator_file.write_text(validator or "")
            length = answer.headers.get("content-length")
            total = offset + int(length) if length else None
            with partial.open("r+b" if offset else "wb") as file:
                file.seek(offset)
                for chunk in answer.iter_raw():
                    file.write(chunk)
                    if limit is not None and file.tell() > limit:
                        _discard(partial)
                        raise ServiceError(f"it holds more than the {limit} bytes expected")
                    if total:
                        meter.advance_to(file.tell() / total)

    def probe_host(self, url: str) -> "Future[str]":
        """Starts a check in the background whether the host accepts connections, once per host and run.

        Returns:
            The error message, empty if the host accepts connections.
        """
        try:
            address = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise ServiceError(f"not a valid address: {_reason(error)}") from error
        port = address.port or (443 if address.scheme == "https" else 80)
        host = f"{address.host}:{port}"
        with self._lock:
            if host not in self._hosts:
                future = self._hosts[host] = Future[str]()
                # A daemon thread, since the lookup of an unknown name may block for much longer than the timeout.
                probe = (address.host, port, self._connect_seconds, future)
                threading.Thread(target=_probe, args=probe, daemon=True).start()
            return self._hosts[host]

    def require_host(self, url: str) -> None:
        """Raises ServiceError if the host accepts no connections, as the user's settings for the web reach it."""
        future = self.probe_host(url)
        try:
            through_proxy = proxy_of(url)
            if url.startswith("https:"):
                certificates()
        except UsageError as error:  # another mirror may need neither proxy nor certificates
            raise ServiceError(str(error)) from None
        if through_proxy:
            return  # the proxy reports quickly which hosts it cannot reach
        try:
            problem = future.result(TRIES * self._connect_seconds + 0.5)
        except TimeoutError:  # during the lookup of its name
            problem = _no_answer(self._connect_seconds)
        if problem:
            raise ServiceError(f"no connection to {httpx.URL(url).host}: {problem}")


class _TryAgain(Exception):
    """The request failed in a way that may be temporary."""


def _probe(host: str, port: int, seconds: float, future: "Future[str]") -> None:
    """Connects, up to TRIES times; the future's result is the last error message, empty on success."""
    problem = ""
    for _ in range(TRIES):
        try:
            socket.create_connection((host, port), seconds).close()
        except TimeoutError:
            problem = _no_answer(seconds)
        except OSError as error:
            problem = error.strerror or _reason(error)
        else:
            problem = ""
            break
    future.set_result(problem)


def _no_answer(seconds: float) -> str:
    return f"no answer to {TRIES} tries of {seconds:g} s"


def _require_success(answer: httpx.Response) -> None:
    status = f"{answer.status_code} {answer.reason_phrase}".strip()
    if answer.status_code >= 500 or answer.status_code in {408, 429}:
        raise _TryAgain(status)
    if answer.status_code not in {200, 206}:
        raise ServiceError(status)


def _strong_validator(answer: httpx.Response) -> str | None:
    """Returns what If-Range accepts (RFC 9110, section 13.1.5): a strong ETag, or else the modification date."""
    etag: str = answer.headers.get("etag", "")
    return etag if etag.startswith('"') else answer.headers.get("last-modified") or None


def _validator_file(partial: Path) -> Path:
    return partial.with_suffix(".validator")


def _discard(partial: Path) -> None:
    partial.unlink(missing_ok=True)
    _validator_file(partial).unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _reason(error: Exception) -> str:
    return one_line(error) or type(error).__name__
