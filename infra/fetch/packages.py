"""What the fetchers of packages share: each package is downloaded once, by a program that uses the web."""

import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from infra.errors import ServiceError
from infra.machine import stopping
from infra.web_settings import web_environment

POLL_SECONDS = 0.5


class Downloads:
    """The packages of one download run; each is downloaded at most once. Threads may share it.

    Args:
        download: downloads a package into a folder and returns its file, or raises ServiceError.
    """

    def __init__(self, download: Callable[[str, Path], Path]) -> None:
        self._download = download
        self._lock = threading.Lock()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files: dict[str, Path | ServiceError] = {}

    def close(self) -> None:
        """Deletes the downloaded packages."""
        if self._folder:
            self._folder.cleanup()

    def file(self, package: str) -> Path:
        """Returns a package's file; raises an earlier failure again without a new attempt."""
        with self._lock:
            if package not in self._files:
                try:
                    self._folder = self._folder or tempfile.TemporaryDirectory(prefix="convoy-packages-")
                    self._files[package] = self._download(package, Path(self._folder.name))
                except ServiceError as error:
                    self._files[package] = error
            found = self._files[package]
        if isinstance(found, ServiceError):
            raise found
        return found


def environment_for_web() -> dict[str, str]:
    """Returns this process's environment with the user's proxies and certificates."""
    return os.environ | web_environment()


def run_program(
    command: Sequence[str],
    *,
    what: str,
    seconds: float,
    environment: Mapping[str, str],
    folder: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a program without standard input, in `folder`, and returns what it said.

    Raises:
        ServiceError: `what` took over `seconds`.
        Stopped: a signal has arrived; the program was killed.
    """
    deadline = time.monotonic() + seconds
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as program:
        try:
            while True:
                stopping.check()
                with suppress(subprocess.TimeoutExpired):
                    output, errors = program.communicate(timeout=POLL_SECONDS)
                    return subprocess.CompletedProcess(command, program.returncode, output, errors)
                if time.monotonic() > deadline:
                    raise ServiceError(f"{what} took over {seconds} s")
        finally:
            program.kill()
