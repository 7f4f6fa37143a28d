"""Takes and inspects locks. The kernel releases a lock (flock(2)) when its holder dies."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infra.machine import stopping

LOCK_POLL_SECONDS = 0.05


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock named by `path` during the block; waits while another thread or process holds it.

    Raises:
        Stopped: a signal asked this process to end.
    """
    while True:
        with try_locked(path) as taken:
            if taken:
                yield
                return
        stopping.sleep(LOCK_POLL_SECONDS)


@contextmanager
def try_locked(path: Path, note: str = "") -> Iterator[bool]:
    """Takes the lock named by `path` if it is free, and holds it during the block; yields whether it was taken.

    The holder removes the file at the end, so the one that was locked must still be the one at `path`.

    Args:
        note: text for the lock file, which remains if this process is killed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = is_current(path, descriptor)
        except BlockingIOError:
            held = False
        if not held:
            yield False
            return
        try:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, note.encode())
            yield True
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def note_of_dead_holder(path: Path) -> str | None:
    """Returns the note of a lock whose holder was killed; None if there is no lock file, or the lock is held."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        # A shared lock, so that two processes that check at the same time do not see each other as the holder.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return os.read(descriptor, 1000).decode(errors="replace")
    except BlockingIOError:
        return None
    finally:
        os.close(descriptor)


def is_held(path: Path) -> bool:
    """Returns whether a process holds the lock."""
    return path.exists() and note_of_dead_holder(path) is None


def is_current(path: Path, file: int) -> bool:
    """Returns whether an open lock file is still the one at `path`."""
    try:
        return path.stat().st_ino == os.fstat(file).st_ino
    except FileNotFoundError:
        return False
