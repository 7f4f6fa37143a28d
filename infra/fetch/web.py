"""Files from web servers: resumed after a cut, and a dead host is given up quickly, once for all files."""

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
from infra.machine.files import locked
from infra.web_settings import WebTransport, certificates, proxy_of

CONNECT_SECONDS = 3.0
READ_SECONDS = 15.0
TRIES = 2  # in a row that bring nothing
MOST_TRANSFERS = 20  # of one file, each of which brought something
IDENTITY = {"Accept-Encoding": "identity"}  # digests are of the file, not of what a proxy made of it


def display(url: str) -> str:
    """The address as people and logs may see it: without user, password and signed parameters."""
    if not url.startswith(("http:", "https:")):
        return url
    return urlunsplit(urlsplit(without_login(url))._replace(query="", fragment=""))


def file_name(url: str) -> str:
    """Last part of the address's path."""
    return unquote(urlsplit(url).path.rpartition("/")[2])


class Web:
    """A client for one download run; remembers which hosts do not answer. Safe to share between threads."""

    def __init__(self, partial: Path, *, connect_seconds: float = CONNECT_SECONDS) -> None:
        """Open no connection yet.

        Args:
            partial: folder of unfinished files, which a later run goes on with.
            connect_seconds: how long one attempt to connect may take.
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
        """Let go of connections."""
        self._client.close()

    def knock(self, url: str) -> None:
        """Find out in the background whether the address's host takes connections; once a host and run."""
        self._host(url)

    def version(self, url: str) -> tuple[str | None, int | None]:
        """The server's mark of the file's present version, and its size in bytes; None for what it does not
        tell.

        Raises:
            ServiceError: it did not answer.
        """
        try:
            self._require_host(url)
            answer = self._client.head(url, headers=IDENTITY)
        except (httpx.HTTPError, ServiceError) as error:
            raise ServiceError(f"{display(url)}: {_reason(error)}") from error
        if answer.status_code != 200:
            return None, None  # perhaps it refuses only HEAD, as signed addresses do
        return _strong_validator(answer), int(answer.headers.get("content-length", 0)) or None

    @contextmanager
    def fetched(self, url: str, limit: int | None, meter: Meter) -> Iterator[Path]:
        """Yield a local file with what `url` holds; it is removed at the end, also when the caller rejects
        it.

        A transfer that is cut goes on where it stopped, in this run or the next one, if the server says by
        its ETag or date that the file is still the same.

        Args:
            limit: most bytes to accept; None for no limit.

        Raises:
            ServiceError: why there is no file.
        """
        self._require_host(url)
        partial = self._partial / hashlib.sha256(display(url).encode()).hexdigest()
        with locked(partial.with_suffix(".lock")):  # another process may want the same file
            self._complete(url, partial, limit, meter)
            try:
                yield partial
            finally:
                _discard(partial)

    def _complete(self, url: str, partial: Path, limit: int | None, meter: Meter) -> None:
        """Transfer until the file is whole; gives up after TRIES transfers in a row that brought nothing."""
        fruitless = 0
        for transfers in range(1, MOST_TRANSFERS + 1):
            before = _size(partial)
            try:
                return self._transfer(url, partial, limit, meter)
            except (httpx.TransportError, _TryAgain) as error:
                fruitless = 0 if _size(partial) > before else fruitless + 1
                if fruitless == TRIES or transfers == MOST_TRANSFERS:
                    raise ServiceError(f"{_reason(error)} ({transfers} tries)") from error
                time.sleep(0.2 * fruitless)
            except httpx.HTTPError as error:  # a redirect loop, say
                raise ServiceError(_reason(error)) from error

    def _transfer(self, url: str, partial: Path, limit: int | None, meter: Meter) -> None:
        """One request: for the whole file, or for what is missing of it."""
        offset, mark = _size(partial), _mark_of(partial)
        expected = mark.read_text() if offset and mark.exists() else None
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
            mark.write_text(validator or "")
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
                        meter.at(file.tell() / total)

    def _host(self, url: str) -> "Future[str]":
        try:
            address = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise ServiceError(f"not a valid address: {_reason(error)}") from error
        port = address.port or (443 if address.scheme == "https" else 80)
        place = f"{address.host}:{port}"
        with self._lock:
            if place not in self._hosts:
                future = self._hosts[place] = Future[str]()
                # A daemon thread, since a name that does not resolve may block for much longer than we care
                # to wait.
                threading.Thread(
                    target=_knock, args=(address.host, port, self._connect_seconds, future), daemon=True
                ).start()
            return self._hosts[place]

    def _require_host(self, url: str) -> None:
        future = self._host(url)
        try:
            through_proxy = proxy_of(url)
            if url.startswith("https:"):
                certificates()
        except UsageError as error:  # another mirror may need neither
            raise ServiceError(str(error)) from None
        if through_proxy:
            return  # which says quickly what it cannot reach
        try:
            problem = future.result(TRIES * self._connect_seconds + 0.5)
        except TimeoutError:  # while looking up its name
            problem = _no_answer(self._connect_seconds)
        if problem:
            raise ServiceError(f"no connection to {httpx.URL(url).host}: {problem}")


class _TryAgain(Exception):
    """The answer was bad in a way that may pass."""


def _knock(host: str, port: int, seconds: float, future: "Future[str]") -> None:
    """Connect once or twice; the result is what went wrong, or nothing."""
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
    """What If-Range accepts (RFC 9110, section 13.1.5): a strong ETag, else the date of the last change."""
    etag: str = answer.headers.get("etag", "")
    return etag if etag.startswith('"') else answer.headers.get("last-modified") or None


def _mark_of(partial: Path) -> Path:
    return partial.with_suffix(".validator")


def _discard(partial: Path) -> None:
    partial.unlink(missing_ok=True)
    _mark_of(partial).unlink(missing_ok=True)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _reason(error: Exception) -> str:
    return one_line(error) or type(error).__name__
