"""Local files: digests, atomic replacement, and locks between processes."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from infra.errors import UsageError

CHUNK = 1 << 20

OnBytes = Callable[[int], object]
"""Called from any thread with the number of bytes just moved; negative if a part has to be moved again."""


def file_digest(path: Path, algorithm: str = "sha256") -> str:
    """Returns the hexadecimal digest of a file's content, without holding the file in memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def check_writable(path: Path, option: str, *, replaced: bool = True) -> None:
    """Checks the value of an option that names a file to write, before the work rather than after it.

    Args:
        replaced: whether a new file replaces the old one, so that devices and pipes cannot be named.

    Raises:
        UsageError: a file cannot be written there.
    """
    real = os.path.realpath(path)  # functions of os.path, since methods of Path raise where one may not look
    in_place = not replaced and os.path.exists(path) and is_irreplaceable(path)
    special = os.path.isdir(real) or (replaced and os.path.exists(real) and not os.path.isfile(real))
    if special or not os.access(path if in_place else os.path.dirname(real), os.W_OK):
        raise UsageError(f"{option} {path}: cannot write there; name a file in a folder that exists")


def is_irreplaceable(path: Path) -> bool:
    """Returns whether a new file must not replace the path: a device, a pipe, or a link such as /dev/stdout."""
    return os.path.islink(path) or (os.path.exists(path) and not os.path.isfile(path))


@contextmanager
def temporary_file(folder: Path) -> Iterator[Path]:
    """Yields an empty hidden file in `folder`, and removes it at the end unless it was moved."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=".", suffix=".part", dir=folder)
    os.close(descriptor)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def publish(temporary: Path, target: Path) -> None:
    """Moves a finished file to its name, durably: readers see the old file, no file, or the whole new one.

    Both names must be on one file system.
    """
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary.replace(target)
    descriptor = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)  # else a power cut could undo the rename
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(target: Path, *, public: bool = False) -> Iterator[Path]:
    """Yields a temporary path next to `target`; publishes it as `target` when the block ends without an error.

    A link stays one: the file that it leads to is replaced.

    Args:
        public: whether the file has the mode of the one that it replaces, or that of any new file; otherwise only its
            owner can read it.
    """
    target = Path(os.path.realpath(target))
    with temporary_file(target.parent) as temporary:
        if public:
            temporary.unlink()
            temporary.touch(0o666, exist_ok=False)  # less the umask
        yield temporary
        if public and target.exists():
            shutil.copymode(target, temporary)
        publish(temporary, target)


def write_if_changed(target: Path, text: str) -> None:
    """Makes `text` the content of a file that other processes read at any time; a new one only its owner can read."""
    if not target.exists() or target.read_bytes() != text.encode():
        with atomic_file(target) as temporary:
            temporary.write_text(text)
