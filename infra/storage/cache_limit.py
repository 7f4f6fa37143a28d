"""Keeps a cache within a number of bytes: removes the least recently used files before a new one is downloaded."""

import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from infra.machine.locks import is_held, locked

ABANDONED_SECONDS = 3600.0  # an unfinished file that was not written to for so long belongs to a killed process
SHARE_OF_FREE = 0.9

logger = logging.getLogger(__name__)


class _File(NamedTuple):
    used: float
    size: int
    path: Path


class CacheLimit:
    """The limit of a cache's folder, over all processes.

    A file's modification time is the time of its last use. While a preprocessing runs on this machine, files that were
    used since it began are not removed, because it may still read them. A process that has mapped a file can read it
    after the removal.

    Args:
        root: the cache's folder.
        limit: bytes.
    """

    def __init__(self, root: Path, limit: int) -> None:
        self._root, self.limit = root, limit

    def make_space(self, size: int, lock: Path) -> None:
        """Removes files until a new one fits.

        Args:
            size: bytes of the new file.
            lock: the new file's lock, which the caller holds until the file is there. The (sparse) lock file is
                truncated to that size, as a reservation that other processes can add up.
        """
        with locked(self._root / "locks" / "room"):
            os.truncate(lock, size)
            # In this order, a file that arrives in between is in both lists; in the other order it could be in neither.
            sizes = self._reserved()
            files = _files(self._root)
            for file in files:
                sizes[file.path.name] = max(file.size, sizes.get(file.path.name, 0))
            excess = sum(sizes.values()) - self.limit
            kept_since = self._preprocessing_since()
            for file in sorted(files):
                if excess <= 0 or file.used >= kept_since:
                    break
                if _remove(file):
                    excess -= file.size
        if excess > 0:
            logger.warning("%s holds %d bytes more than its limit of %d, all in use", self._root, excess, self.limit)

    def _reserved(self) -> dict[str, int]:
        """Returns the bytes of each file that is being downloaded, by name."""
        held = self._held("[0-9a-f]" * 64)
        return {lock.name: status.st_size for lock, status in held}

    def _preprocessing_since(self) -> float:
        return min((status.st_mtime for _, status in self._held("preprocess-*")), default=float("inf"))

    def _held(self, pattern: str) -> Iterator[tuple[Path, os.stat_result]]:
        for lock in (self._root / "locks").glob(pattern):
            with suppress(FileNotFoundError):  # it was just released
                if is_held(lock):
                    yield lock, lock.stat()


def disk_limit(root: Path) -> int:
    """Returns the default limit in bytes: what the cache holds, plus nine tenths of the disk's free space."""
    folder = root
    while not folder.exists():
        folder = folder.parent
    return sum(file.size for file in _files(root)) + int(SHARE_OF_FREE * shutil.disk_usage(folder).free)


def _files(root: Path) -> list[_File]:
    """Returns all complete files; removes unfinished ones of killed processes."""
    files = []
    for path in (*root.glob("[0-9a-f][0-9a-f]/*"), *root.glob(".*.part")):
        try:
            status = path.stat()
        except FileNotFoundError:  # it was just removed
            continue
        if not path.name.startswith("."):
            files.append(_File(status.st_mtime, status.st_size, path))
        elif status.st_mtime < time.time() - ABANDONED_SECONDS:
            path.unlink(missing_ok=True)
    return files


def _remove(file: _File) -> bool:
    """Removes a file unless it was used since it was listed: a mapped file would keep its disk space anyway."""
    hidden = file.path.with_name(f".{file.path.name}.leaving")
    with suppress(FileNotFoundError):  # another process removed it
        file.path.rename(hidden)  # from now on no process begins to use it
        if hidden.stat().st_mtime != file.used:
            hidden.rename(file.path)
            return False
        hidden.unlink()
    return True
