"""A content-addressed cache on this machine for files of the bucket."""

import hashlib
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import IO

from infra.errors import ServiceError
from infra.machine.files import CHUNK, OnBytes, file_digest, publish, temporary_file
from infra.machine.locks import locked
from infra.storage.cache_limit import CacheLimit
from infra.storage.object_store import ObjectStore

READ_ONLY = 0o444  # a file named by its content must not change

logger = logging.getLogger(__name__)


class Cache:
    """Files `root/<first two digits>/<sha256>`, each verified before this object returns it for the first time.

    Several processes and threads may share one folder: a file appears whole or not at all, and one process downloads it
    while the others wait.

    A file that is damaged on disk is fetched again, with a warning. Records of earlier verifications are not trusted,
    since size and times of a file do not show that a byte has changed. Measured: SHA-256 takes 1 s per 1.2 GB on one
    thread of a processor with SHA instructions, so 0.05 s for Fashion-MNIST and 8 s for 10 GB; callers that fetch many
    files use several threads.

    Args:
        root: the folder.
        store: the bucket that files are fetched from.
        limit: bytes that the folder may hold: a fetch removes the least recently used files, so open a path that
            `fetch` returned before the next fetch. None: nothing is removed.
    """

    def __init__(self, root: Path, store: ObjectStore, *, limit: int | None = None) -> None:
        self.root = root
        self.store = store
        self.limit = limit
        self._limit = None if limit is None else CacheLimit(root, limit)
        self._verified: dict[str, int] = {}  # SHA-256 → inode of the file that had it

    def path(self, sha256: str) -> Path:
        """Returns the path of the file with this digest, whether or not it is there."""
        return self.root / sha256[:2] / sha256

    def holds(self, sha256: str, size: int | None = None) -> bool:
        """Returns whether the file is in the cache, with `size` bytes if that is given."""
        try:
            found = self.path(sha256).stat().st_size
        except FileNotFoundError:
            return False
        return size is None or found == size

    def add_file(self, path: Path) -> str:
        """Copies a local file into the cache and returns its SHA-256."""
        digest = file_digest(path)
        if self._use(digest, path.stat().st_size):
            return digest
        with path.open("rb") as stream:
            return self.add_stream(stream)

    def add_stream(self, stream: IO[bytes], *, sha256: str | None = None, size: int | None = None) -> str:
        """Copies a stream into the cache and returns its SHA-256.

        Args:
            sha256: the expected digest.
            size: the expected number of bytes; at most one more is read.

        Raises:
            ServiceError: the content is another one; nothing is kept.
        """
        digest, count = hashlib.sha256(), 0
        with temporary_file(self.root) as temporary:
            with temporary.open("wb") as file:
                while chunk := stream.read(CHUNK if size is None else min(CHUNK, size + 1 - count)):
                    digest.update(chunk)
                    count += len(chunk)
                    file.write(chunk)
            got = digest.hexdigest()
            if size is not None and count > size:
                raise ServiceError(f"it holds more than the {size} bytes expected (SHA-256 {sha256 or 'unknown'})")
            if sha256 is not None and got != sha256:
                raise ServiceError(f"its SHA-256 is {got}, expected {sha256}")
            if size is not None and count != size:
                raise ServiceError(f"it holds {count} bytes, expected {size}")
            temporary.chmod(READ_ONLY)
            publish(temporary, self.path(got))
            self._note_verified(got)
        return got

    def fetch(self, key: str, sha256: str, *, size: int | None = None, on_progress: OnBytes | None = None) -> Path:
        """Returns the local path of an object's verified content; downloads it if it is missing or damaged.

        Args:
            key: the object's key in the bucket.
            size: bytes of the object; None asks the store.

        Raises:
            ObjectMissing: it is neither in the cache nor in the bucket.
        """
        if size is None and (info := self.store.head(key)):
            size = info.size
        path = self.path(sha256)
        if self._use(sha256, size):
            return path
        lock = self.root / "locks" / sha256
        with locked(lock):
            if not self._use(sha256, size):  # else another process fetched it during the wait
                if path.exists():
                    logger.warning("%s is damaged and is fetched again; check the disk if this happens often", path)
                    path.unlink(missing_ok=True)
                if self._limit and size is not None:
                    self._limit.make_space(size, lock)
                self.store.get_file(key, path, sha256=sha256, on_progress=on_progress)
                self._note_verified(sha256)
        return path

    def trim(self) -> None:
        """Removes the least recently used files until the limit holds, after files were added without it."""
        if self._limit:
            lock = self.root / "locks" / "trim"
            with locked(lock):
                self._limit.make_space(0, lock)

    def _use(self, sha256: str, size: int | None) -> bool:
        """Returns whether the file is there and undamaged; if so, marks it as used now."""
        path = self.path(sha256)
        if not self.holds(sha256, size):
            return False
        with suppress(OSError):  # it may have just been removed, or belong to another user
            os.utime(path)
        try:
            with path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if self._verified.get(sha256) != inode:
                    if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                        return False
                    self._verified[sha256] = inode
        except OSError:  # it was just removed, or cannot be read
            return False
        return path.exists()

    def _note_verified(self, sha256: str) -> None:
        """Makes a file that was verified on arrival read-only, and records that it need not be hashed again."""
        path = self.path(sha256)
        with suppress(FileNotFoundError):  # it was removed already
            path.chmod(READ_ONLY)
            self._verified[sha256] = path.stat().st_ino
