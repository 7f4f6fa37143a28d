"""Reading a tar archive as a stream, compressed or not; nothing is ever extracted to a path."""

import lzma
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from cnn.errors import InputError


@contextmanager
def tar_stream(name: str, path: Path) -> Iterator[Iterator[tuple[tarfile.TarInfo, "TarReader"]]]:
    """The members in the archive's order, each with its reader; damage raises InputError naming `name`."""
    try:
        with tarfile.open(path, "r|*", tarinfo=_StrictHeader) as archive:
            yield _members(archive)
    except (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError) as error:
        raise InputError(f"{name} is not a whole tar archive ({error}); fetch it again") from error


class TarReader:
    """Reads the current member of a stream; valid until the next member is asked for."""

    def __init__(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        self._stream = archive.extractfile(member) if member.isreg() else None

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes; nothing for what is not a regular file."""
        return self._stream.read(size) if self._stream else b""


class _StrictHeader(tarfile.TarInfo):
    """Only a block of zeros ends an archive; tarfile takes a cut or damaged header for the end as well."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error or 'no end mark'}") from error


def _members(archive: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, TarReader]]:
    while (member := archive.next()) is not None:
        yield member, TarReader(archive, member)
        archive.members.clear()  # type: ignore[attr-defined]  # or the list of headers grows with the archive
