"""Keeping a cache within a number of bytes: the least recently used files leave before a new one comes in."""

import logging
import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from infra.machine.files import locked
from infra.machine.locks import is_held

ABANDONED = 3600.0  # seconds after which nobody writes to an unfinished file any more
SHARE_OF_FREE = 0.9

logger = logging.getLogger(__name__)


class _File(NamedTuple):
    used: float
    size: int
    path: Path


class CacheLimit:
    """How much a cache's folder may hold, all processes together.

    Files are as old as their modification time, which whoever uses one sets to now. While data are being prepared on
    this machine, nothing that was used since that began leaves: the preparation may still read it. A file that a
    process has mapped stays readable there when it leaves.

    Args:
        root: the cache's folder.
        limit: bytes.
    """

    def __init__(self, root: Path, limit: int) -> None:
        self._root, self.limit = root, limit

    def make_room(self, size: int, coming: Path) -> None:
        """Have room for a file.

        Args:
            size: of the file, in bytes.
            coming: the file's lock, which the caller holds until the file is here. It is given that length (and takes
                no room itself), so that others see what is on its way.
        """
        with locked(self._root / "locks" / "room"):
            os.truncate(coming, size)
            # In this order: a file that arrives in between is in both, and not, as the other way round, in neither.
            sizes = self._coming()
            files = _files(self._root)
            for file in files:
                sizes[file.path.name] = max(file.size, sizes.get(file.path.name, 0))
            excess = sum(sizes.values()) - self.limit
            spared = self._spared_since()
            for file in sorted(files):
                if excess <= 0 or file.used >= spared:
                    break
                if _leaves(file):
                    excess -= file.size
        if excess > 0:
            logger.warning("%s holds %d bytes more than the %d it may: they are in use", self._root, excess, self.limit)

    def _coming(self) -> dict[str, int]:
        """Bytes of each file that is on its way, by its name."""
        locks = [lock for lock in (self._root / "locks").iterdir() if re.fullmatch("[0-9a-f]{64}", lock.name)]
        return {lock.name: _size(lock) for lock in locks if is_held(lock)}

    def _spared_since(self) -> float:
        began = [_began(lock) for lock in (self._root / "locks").glob("preprocess-*") if is_held(lock)]
        return min(began, default=float("inf"))


def disk_limit(root: Path) -> int:
    """Bytes that a cache may hold if nobody says: what it holds, and nine tenths of what its disk has free."""
    folder = root
    while not folder.exists():
        folder = folder.parent
    return sum(file.size for file in _files(root)) + int(SHARE_OF_FREE * shutil.disk_usage(folder).free)


def _files(root: Path) -> list[_File]:
    """All whole files; what killed processes left unfinished is removed."""
    files = []
    for path in root.glob("[0-9a-f][0-9a-f]/*"):
        try:
            status = path.stat()
        except FileNotFoundError:  # it has just left
            continue
        if not path.name.startswith("."):
            files.append(_File(status.st_mtime, status.st_size, path))
        elif status.st_mtime < time.time() - ABANDONED:
            path.unlink(missing_ok=True)
    return files


def _leaves(file: _File) -> bool:
    """Removes a file, unless it was taken into use since it was listed: mapped, it would take room all the same."""
    leaving = file.path.with_name(f".{file.path.name}.leaving")
    with suppress(FileNotFoundError):  # it has left already
        file.path.rename(leaving)  # a process that has not touched it before does not find it any more
        if leaving.stat().st_mtime != file.used:
            leaving.rename(file.path)
            return False
        leaving.unlink()
    return True


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _began(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")
