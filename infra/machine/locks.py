"""Locks of `infra.machine.files.locked` for those who do not want to wait."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def try_locked(path: Path, note: str = "") -> Iterator[bool]:
    """Hold the lock named by `path` if nobody else does; yields whether it is held.

    Args:
        note: written into the lock file, which stays if its holder is killed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = path.stat().st_ino == os.fstat(descriptor).st_ino  # its last holder may have removed the file
        except (BlockingIOError, FileNotFoundError):
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


def left_behind(path: Path) -> str | None:
    """The note of a lock whose holder was killed; None if there is no lock file, or somebody holds it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        # Shared, so that two who look at once do not take each other for the holder.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return os.read(descriptor, 1000).decode(errors="replace")
    except BlockingIOError:
        return None
    finally:
        os.close(descriptor)


def is_held(path: Path) -> bool:
    """Whether somebody holds the lock."""
    return path.exists() and left_behind(path) is None
