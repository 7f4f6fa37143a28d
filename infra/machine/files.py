"""Local files: digests, atomic replacement, and locks between processes."""

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from infra.machine import stopping

CHUNK = 1 << 20
LOCK_POLL = 0.05  # seconds between looks whether a lock is free

OnBytes = Callable[[int], object]
"""Called with a number of bytes just moved, from any thread; negative where a part has to be moved again."""


def file_digest(path: Path, algorithm: str = "sha256") -> str:
    """Hexadecimal digest of a file's content, read in a stream."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def temporary_file(folder: Path) -> Iterator[Path]:
    """Yield an empty hidden file in `folder`; whatever is still there at the end is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=".", suffix=".part", dir=folder)
    os.close(descriptor)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def publish(temporary: Path, target: Path) -> None:
    """Move a finished file to its name, durably: readers see the old file, or none, or the whole new one.

    Both must be on one file system.
    """
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary.replace(target)
    sync_folder(target.parent)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`, published as `target` when the block ends without an error."""
    with temporary_file(target.parent) as temporary:
        yield temporary
        publish(temporary, target)


def wait_for_lock(file: int) -> None:
    """Takes the lock of an open file (flock(2)), however long another process holds it.

    Raises:
        Stopped: a signal asks this process to end.
    """
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stopping.sleep(LOCK_POLL)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock named by `path`; others, in this or another process, wait.

    The kernel frees it when its holder dies. The lock file is removed by whoever releases it, so a waiter
    checks that the file it locked is still the one at `path`, and otherwise locks the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            wait_for_lock(descriptor)
            try:
                current = path.stat().st_ino == os.fstat(descriptor).st_ino
            except FileNotFoundError:
                current = False
            if current:
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return
        finally:
            os.close(descriptor)
