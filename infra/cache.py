"""A content-addressed cache of the bucket's files on this machine."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import IO

from infra.errors import ServiceError
from infra.files import CHUNK, OnBytes, file_digest, locked, publish, temporary_file
from infra.objectstore import ObjectStore
from infra.room import Room

READ_ONLY = 0o444  # a file named by its content must not be written to


class Cache:
    """Files under `root/<first two digits>/<sha256>`, each verified once, when it came in.

    Several processes and threads may share one folder: a file appears whole or not at all, and one of them
    fetches it while the others wait.

    Args:
        root: the folder.
        store: where files come from.
        limit: bytes that the folder may hold: what was not used for longest leaves when a file is fetched. A path that
            `fetch` returned is then good for opening it at once. None: nothing leaves.
    """

    def __init__(self, root: Path, store: ObjectStore, *, limit: int | None = None) -> None:
        self.root = root
        self.store = store
        self.limit = limit
        self._room = None if limit is None else Room(root, limit)

    def path(self, sha256: str) -> Path:
        """Where the file with this digest is, or would be."""
        return self.root / sha256[:2] / sha256

    def holds(self, sha256: str, size: int | None = None) -> bool:
        """Whether the file is here, and of `size` bytes if that is given."""
        try:
            found = self.path(sha256).stat().st_size
        except FileNotFoundError:
            return False
        return size is None or found == size

    def add_file(self, path: Path) -> str:
        """Copy a local file in, whatever it holds; returns its SHA-256."""
        digest = file_digest(path)
        if self.holds(digest, path.stat().st_size):
            return digest
        with path.open("rb") as stream:
            return self.add_stream(stream)

    def add_stream(self, stream: IO[bytes], *, sha256: str | None = None, size: int | None = None) -> str:
        """Copy a stream in and return its SHA-256.

        Args:
            sha256: refuse any other content.
            size: refuse any other number of bytes, and read no more than one byte beyond it.

        Raises:
            ServiceError: the content was refused; nothing stays behind.
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
            self._adopt(temporary, got)
        return got

    def fetch(self, key: str, sha256: str, *, size: int | None = None, on_progress: OnBytes | None = None) -> Path:
        """The local path of an object's content; downloaded and verified when it is not here, or has another
        size.

        Args:
            key: of the object in the bucket.
            size: of the object in bytes, if known; else the store is asked.

        Raises:
            ObjectMissing: neither here nor in the bucket.
        """
        if size is None and (info := self.store.head(key)):
            size = info.size
        path = self.path(sha256)
        if self._use(path, sha256, size):
            return path
        lock = self.root / "locks" / sha256
        with locked(lock):
            if not self._use(path, sha256, size):  # nobody fetched it while we waited
                if self._room and size is not None:
                    self._room.make(size, lock)
                self.store.get_file(key, path, sha256=sha256, on_progress=on_progress)
                path.chmod(READ_ONLY)
        return path

    def drop(self, sha256: str) -> None:
        """Forget a file."""
        self.path(sha256).unlink(missing_ok=True)

    def _use(self, path: Path, sha256: str, size: int | None) -> bool:
        """Whether the file is here; if so, it counts as used now."""
        if not self.holds(sha256, size):
            return False
        with suppress(OSError):  # it may have just left, or be another user's
            os.utime(path)
        return path.exists()

    def _adopt(self, temporary: Path, sha256: str) -> None:
        temporary.chmod(READ_ONLY)
        publish(temporary, self.path(sha256))
