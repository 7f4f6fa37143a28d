"""Reads a tar archive as a stream, compressed or not; nothing is ever extracted to a path."""

import lzma
import struct
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, Self

from cnn.errors import InputError

MAX_HEADER_BYTES = 2**20
"""Limit of one member's extended headers (pax, GNU long names), and of all global headers; tarfile reads them whole."""

_EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


@contextmanager
def tar_stream(name: str, path: Path) -> Iterator[Iterator[tuple[tarfile.TarInfo, "TarReader"]]]:
    """Yields the members in the archive's order, each with its reader; raises InputError if the archive is damaged."""
    try:
        with _StrictTar.open(path, "r|*", encoding="utf-8", errors="surrogateescape") as archive:
            yield _members(archive)
    except InputError:
        raise
    except _Unsupported as error:
        raise InputError(f"{name}: {error}") from error
    except (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError, struct.error) as error:
        raise InputError(f"{name} is not a whole tar archive ({error}); fetch it again") from error


class TarReader:
    """Reads the current member of a stream; valid until the next member is requested."""

    def __init__(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        self._stream = archive.extractfile(member) if member.isreg() else None

    def read(self, size: int = -1) -> bytes:
        """Returns up to `size` bytes, or none if the member is not a regular file."""
        return self._stream.read(size) if self._stream else b""


class _Unsupported(Exception):
    """The archive is whole, but uses a feature of tar that archives of images do not need."""


class _StrictHeader(tarfile.TarInfo):
    """A header that must not be damaged: only a block of zeros ends an archive, while tarfile also stops at damage."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error or 'no end mark'}") from error

    def _proc_member(self, archive: "_StrictTar") -> tarfile.TarInfo:
        """Checks a header; tarfile calls it before it reads anything else of the member."""
        archive.count_headers(self)
        member: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]
        if member.size < 0:
            raise tarfile.ReadError("negative size")
        return member

    def _refuse_sparse(self, *args: object) -> NoReturn:
        """Replaces tarfile's functions, which keep a list of holes of unlimited length."""
        raise _Unsupported("a member is a sparse file; pack it again without --sparse")

    _proc_sparse = _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_sparse


class _StrictTar(tarfile.TarFile):
    tarinfo = _StrictHeader

    _headers, _global_headers = 0, 0  # bytes

    def count_headers(self, header: tarfile.TarInfo) -> None:
        """Raises _Unsupported if extended headers, which are held in memory, exceed their limit."""
        if header.size < 0:
            raise tarfile.ReadError("negative size")
        if header.type == tarfile.XGLTYPE:
            self._global_headers += tarfile.BLOCKSIZE + header.size
        # tarfile reads one member's headers recursively, so their number has a limit too.
        self._headers = self._headers + max(header.size, MAX_HEADER_BYTES // 64) if header.type in _EXTENDED else 0
        if max(self._headers, self._global_headers) > MAX_HEADER_BYTES:
            raise _Unsupported(f"it has more than {MAX_HEADER_BYTES:,} bytes of headers; pack it again as a plain tar")


def _members(archive: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, TarReader]]:
    while (member := archive.next()) is not None:
        yield member, TarReader(archive, member)
        archive.members.clear()  # type: ignore[attr-defined]  # otherwise the list grows with the archive
