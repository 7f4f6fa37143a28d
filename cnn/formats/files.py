"""The interface through which a folder of images is read, and its implementation for local files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol


class Files(Protocol):
    """N files by position, in the order of their paths. Several threads may use it."""

    @property
    def paths(self) -> Sequence[str]:
        """Relative posix paths (`train/cat/1.png`), sorted by code points."""

    @property
    def folders(self) -> Sequence[str]:
        """Paths of the known folders, which may have no files."""

    def size(self, position: int) -> int:
        """Returns the file's size in bytes."""

    def read(self, position: int) -> bytes:
        """Returns the file's content; raises the errors of the disk or server that stores it."""


class LocalFiles:
    """Files on this machine.

    Args:
        files: path → local file of any name. A path that ends in `/` stands for a folder, and its file is ignored.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.paths = sorted(path for path in files if not path.endswith("/"))
        self.folders = [path for path in files if path.endswith("/")]
        self._places = [files[path] for path in self.paths]

    def size(self, position: int) -> int:
        return self._places[position].stat().st_size

    def read(self, position: int) -> bytes:
        return self._places[position].read_bytes()
