"""Reads a zip or tar archive of class folders; members are read into memory, never extracted to a path."""

import lzma
import os
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

import numpy as np

from cnn.errors import InputError
from cnn.formats.block import FileBlock
from cnn.formats.decode import MAX_FILE_BYTES
from cnn.formats.layout import arrange
from cnn.formats.tar import tar_stream

BLOCK_IMAGES = 32
BLOCK_BYTES = 8 * 2**20  # encoded; a block ends when it reaches this size or that number of images

MAX_EXPANSION, ALWAYS_ALLOWED_BYTES = 100, 2**30
"""All members together may be so many times larger than the archive, or have so many bytes if that is more."""

_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)

_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
    ValueError,
    OSError,
    struct.error,
)
"""Errors of zipfile when an archive is damaged."""

_ZIP_STARTS = (b"PK\3\4", b"PK\5\6", b"PK\7\x08")  # of a zip, an empty one, and one of several parts
_UTF8_FLAG = 0x800


class Member(NamedTuple):
    """An entry of an archive's list of members."""

    name: str
    """As returned by `normal_name`."""

    size: int
    is_folder: bool
    is_file: bool  # a regular file


class ArchiveImages:
    """The images of one archive, whose kind is recognised by its content rather than its name.

    Raises:
        InputError: the archive is damaged, has a member that points outside of it or is no plain file, is suspiciously
            large when uncompressed, or is refused by `cnn.formats.layout.arrange`.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        if len(files) != 1:
            raise InputError(f"expected one archive, found {len(files)} files")
        ((self._name, self._path),) = files.items()
        with self._path.open("rb") as stream:  # a self-extracting zip begins with a program
            self._is_zip = stream.read(4) in _ZIP_STARTS or self._name.lower().endswith(".zip")
        members = check_members(self._name, self._path, self._list_zip() if self._is_zip else self._list_tar())
        stored = [member.name for member in members if member.is_file]
        names = sorted(stored)
        layout = arrange(names, [member.name for member in members if member.is_folder])
        places = zip(layout.labels.tolist(), layout.splits.tolist(), strict=True)
        self._places = {names[index]: place for index, place in zip(layout.chosen.tolist(), places, strict=True)}
        self._in_order = [name for name in stored if name in self._places] == list(self._places)
        self._root = layout.root
        self.classes = layout.classes
        self.left_out = layout.left_out
        self.groups = None

    def __len__(self) -> int:
        return len(self._places)

    def names(self) -> Iterator[str]:
        """Yields the images' paths, without the folders around the class folders."""
        return (name[len(self._root) :] for name in self._places)

    def blocks(self) -> Iterator[FileBlock]:
        """Yields all images in the order of their paths."""
        names: list[str] = []
        contents: list[bytes] = []
        waiting = 0
        for name, content in self._read_zip() if self._is_zip else self._read_tar():
            names.append(name)
            contents.append(content)
            waiting += len(content)
            if len(names) == BLOCK_IMAGES or waiting >= BLOCK_BYTES:
                yield self._block(names, contents)
                names, contents, waiting = [], [], 0
        if names:
            yield self._block(names, contents)

    def _block(self, names: list[str], contents: list[bytes]) -> FileBlock:
        places = np.array([self._places[name] for name in names])
        return FileBlock(
            names=[name.removeprefix(self._root) for name in names],
            files=contents,
            labels=places[:, 0].astype(np.int64),
            splits=places[:, 1].astype(np.int8),
        )

    def _list_zip(self) -> Iterator[Member]:
        try:
            with zipfile.ZipFile(self._path) as archive:
                for info in archive.infolist():
                    name = self._zip_name(info)
                    if info.flag_bits & 1:
                        raise InputError(f"{self._name}: member {name} is encrypted; pack it without a password")
                    if info.compress_type not in _ZIP_METHODS:
                        raise InputError(
                            f"{self._name}: member {name} is compressed by method {info.compress_type} (9: Deflate64), "
                            "which is not supported; pack it again with another program"
                        )
                    kind = stat.S_IFMT(info.external_attr >> 16)  # 0 if the zip was not made on Unix
                    is_folder = info.orig_filename.endswith(("/", "\\"))
                    yield Member(name, info.file_size, is_folder, not is_folder and kind in (0, stat.S_IFREG))
        except InputError:
            raise
        except _ZIP_ERRORS as error:
            raise InputError(f"{self._name} is not a whole zip archive ({error}); fetch it again") from error

    def _zip_name(self, info: zipfile.ZipInfo) -> str:
        encoding = "utf-8" if info.flag_bits & _UTF8_FLAG else "cp437"  # with which zipfile has decoded the name
        return normal_name(self._name, info.orig_filename.encode(encoding).partition(b"\0")[0])

    def _list_tar(self) -> Iterator[Member]:
        with tar_stream(self._name, self._path) as members:
            for member, _ in members:
                yield Member(self._tar_name(member.name), member.size, member.isdir(), member.isreg())

    def _tar_name(self, name: str) -> str:
        return normal_name(self._name, name.encode("utf-8", "surrogateescape"))  # with which tarfile has decoded it

    def _read_zip(self) -> Iterator[tuple[str, bytes]]:
        with zipfile.ZipFile(self._path) as archive:
            stored = {self._zip_name(info): info for info in archive.infolist()}
            for name in self._places:
                try:
                    yield name, archive.read(stored[name])
                except _ZIP_ERRORS as error:
                    raise InputError(f"{self._name}: member {name} is damaged ({error}); fetch it again") from error

    def _read_tar(self) -> Iterator[tuple[str, bytes]]:
        if self._in_order:
            yield from self._stream_tar()
            return
        # Another order would give another dataset version than the folder's: a temporary file restores the order.
        where: dict[str, tuple[int, int]] = {}
        folder = self._path.parent
        with tempfile.TemporaryFile(dir=folder if os.access(folder, os.W_OK) else None) as images:
            for name, content in self._stream_tar():
                where[name] = images.tell(), len(content)
                images.write(content)
            for name in self._places:
                start, size = where[name]
                images.seek(start)
                yield name, images.read(size)

    def _stream_tar(self) -> Iterator[tuple[str, bytes]]:
        """Yields the images in the archive's order."""
        with tar_stream(self._name, self._path) as members:
            for member, reader in members:
                name = self._tar_name(member.name)
                if member.isreg() and name in self._places:
                    yield name, reader.read()


def normal_name(archive: str, name: bytes) -> str:
    """Returns the member's path without `./`, and with `/` in place of the backslashes of some Windows programs.

    A name that is valid UTF-8 is read as UTF-8, even if the archive names another encoding. The encoding of other names
    is unknown, and a byte that looks like a backslash may be half a character: these names are escaped like names of
    files in a folder.

    Raises:
        InputError: a folder's name is in an unknown encoding.
    """
    try:
        return str(PurePosixPath(name.decode().replace("\\", "/")))
    except UnicodeDecodeError:
        text = name.decode(errors="backslashreplace")
    folder, _, _ = name.rpartition(b"/")
    if not folder.isascii() or (not folder and b"\\" in name):
        raise InputError(
            f"{archive}: the name of member {text} is not UTF-8, so its class is unknown; "
            "pack it again with a program that writes UTF-8 names"
        )
    return str(PurePosixPath(text))


def check_members(archive: str, path: Path, members: Iterable[Member]) -> list[Member]:
    """Checks that all members are harmless, and returns them.

    Raises:
        InputError: an absolute path, a `..`, a link, a device, or too many bytes when uncompressed.
    """
    allowed = max(ALWAYS_ALLOWED_BYTES, MAX_EXPANSION * path.stat().st_size)
    checked: list[Member] = []
    names: set[str] = set()
    total = 0
    for member in members:
        name = member.name
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or PureWindowsPath(name).drive:
            raise InputError(f"{archive}: member {name} points outside the archive; pack it without such paths")
        if not member.is_file and not member.is_folder:
            raise InputError(
                f"{archive}: member {name} is a link or a device; pack plain files only, "
                "for example with tar's options -h --hard-dereference"
            )
        total += member.size
        if member.size > MAX_FILE_BYTES or total > allowed:
            raise InputError(f"{archive}: member {name} makes it too large when uncompressed ({total:,} bytes)")
        if member.is_file and name in names:
            raise InputError(f"{archive}: member {name} is there twice; pack each file once")
        names.add(name)
        checked.append(member)
    return checked
