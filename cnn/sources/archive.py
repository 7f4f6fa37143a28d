"""A zip or tar archive of class folders; members are read into memory, never extracted to a path."""

import stat
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

import numpy as np

from cnn.errors import InputError
from cnn.sources.block import FileBlock
from cnn.sources.layout import arrange
from cnn.sources.tar import tar_stream

BLOCK_IMAGES = 32
BLOCK_BYTES = 8 * 2**20  # encoded; a block ends when it has this many bytes or that many images

MAX_MEMBER = 256 * 2**20
"""Bytes of the largest member accepted, uncompressed."""

MAX_RATIO, FREE_SIZE = 100, 2**30
"""Together members may be this many times larger than the archive, or one gigabyte if that is more."""


class Member(NamedTuple):
    """What an archive's own list says about a member."""

    name: str
    size: int
    is_folder: bool
    is_file: bool  # a regular file


class ArchiveSource:
    """One archive; its kind is recognised by its content, whatever the local file is called.

    Raises:
        InputError: the archive is damaged, has a member that points outside of it or is no plain file, is
            suspiciously large when uncompressed, or see `cnn.sources.layout.arrange`.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        if len(files) != 1:
            raise InputError(f"expected one archive, found {len(files)} files")
        ((self._name, self._path),) = files.items()
        with self._path.open("rb") as stream:
            self._is_zip = stream.read(2) == b"PK"
        members = check_members(self._name, self._path, self._list_zip() if self._is_zip else self._list_tar())
        names = sorted(member.name for member in members if member.is_file)
        layout = arrange(names, [member.name for member in members if member.is_folder])
        places = zip(layout.labels.tolist(), layout.splits.tolist(), strict=True)
        self._places = {names[index]: place for index, place in zip(layout.chosen.tolist(), places, strict=True)}
        self.classes = layout.classes
        self.left_out = layout.left_out

    def __len__(self) -> int:
        return len(self._places)

    def blocks(self) -> Iterator[FileBlock]:
        """A zip's images in the order of their paths, a tar's in the archive's own order."""
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
            names=names,
            files=contents,
            labels=places[:, 0].astype(np.int64),
            splits=places[:, 1].astype(np.int8),
        )

    def _list_zip(self) -> Iterator[Member]:
        try:
            with zipfile.ZipFile(self._path) as archive:
                for info in archive.infolist():
                    if info.flag_bits & 1:
                        raise InputError(
                            f"{self._name}: member {info.filename} is encrypted; pack it without a password"
                        )
                    kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the zip was not made on Unix
                    is_file = not info.is_dir() and kind in (0, stat.S_IFREG)
                    yield Member(info.filename, info.file_size, info.is_dir(), is_file)
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise InputError(f"{self._name} is not a whole zip archive ({error}); fetch it again") from error

    def _list_tar(self) -> Iterator[Member]:
        with tar_stream(self._name, self._path) as members:
            for member, _ in members:
                yield Member(member.name, member.size, member.isdir(), member.isreg())

    def _read_zip(self) -> Iterator[tuple[str, bytes]]:
        with zipfile.ZipFile(self._path) as archive:
            stored = {normal_name(info.filename): info for info in archive.infolist()}
            for name in self._places:
                try:
                    yield name, archive.read(stored[name])
                except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
                    raise InputError(f"{self._name}: member {name} is damaged ({error}); fetch it again") from error

    def _read_tar(self) -> Iterator[tuple[str, bytes]]:
        with tar_stream(self._name, self._path) as members:
            for member, reader in members:
                name = normal_name(member.name)
                if member.isreg() and name in self._places:
                    yield name, reader.read()


def normal_name(name: str) -> str:
    """The member's path without `./`; some Windows programs write backslashes."""
    return str(PurePosixPath(name.replace("\\", "/")))


def check_members(archive: str, path: Path, members: Iterable[Member]) -> list[Member]:
    """The members with normal names, once every one of them is known to be harmless.

    Raises:
        InputError: an absolute path, a `..`, a link, a device, or too many bytes when uncompressed.
    """
    allowance = max(FREE_SIZE, MAX_RATIO * path.stat().st_size)
    checked: list[Member] = []
    names: set[str] = set()
    total = 0
    for member in members:
        name = normal_name(member.name)
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or PureWindowsPath(name).drive:
            raise InputError(f"{archive}: member {member.name} points outside the archive; pack it without such paths")
        if not member.is_file and not member.is_folder:
            raise InputError(f"{archive}: member {member.name} is a link or a device; pack plain files only")
        total += member.size
        if member.size > MAX_MEMBER or total > allowance:
            raise InputError(f"{archive}: member {member.name} makes it too large when uncompressed ({total:,} bytes)")
        if member.is_file and name in names:
            raise InputError(f"{archive}: member {name} is there twice; pack each file once")
        names.add(name)
        checked.append(member._replace(name=name))
    return checked
