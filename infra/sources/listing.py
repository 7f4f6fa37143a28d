"""The listing of a folder: path, size and version of each file, as columns.

A million entries take about 100 MB of memory, and 30 MB as a Parquet file.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

BATCH = 10_000  # entries held as Python objects at a time

_SCHEMA = pa.schema([("path", pa.large_string()), ("size", pa.int64()), ("version", pa.large_string())])


class Entry(NamedTuple):
    """One file of a listing."""

    path: str
    """Path relative to the folder, with `/`."""

    size: int
    """Bytes."""

    version: str
    """Changes with the content: an object's ETag, or a local file's modification time in nanoseconds."""


class Listing:
    """Entries, sorted by the code points of their paths."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table.combine_chunks()
        self.paths = Paths(self._table["path"])

    @classmethod
    def collect(cls, entries: Iterable[Entry]) -> "Listing":
        """Returns a listing of entries in any order."""
        entries = iter(entries)
        batches = []
        while batch := list(islice(entries, BATCH)):
            columns = zip(*batch, strict=True)
            arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
            batches.append(pa.record_batch(arrays, schema=_SCHEMA))
        return cls(pa.Table.from_batches(batches, _SCHEMA).sort_by("path"))

    @classmethod
    def load(cls, path: Path) -> "Listing":
        """Reads a file that `save` wrote."""
        return cls(pq.read_table(path, schema=_SCHEMA))

    def save(self, path: Path) -> None:
        """Writes a Parquet file."""
        pq.write_table(self._table, path, compression="zstd")

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __iter__(self) -> Iterator[Entry]:
        for batch in self._table.to_batches(BATCH):
            yield from map(Entry, *(column.to_pylist() for column in batch.columns))

    def __getitem__(self, position: int) -> Entry:
        return Entry(*(column[position].as_py() for column in self._table.columns))

    def position(self, path: str) -> int | None:
        """Returns the position of a path; None if it is not there."""
        found = int(pc.index(self._table["path"], path).as_py())
        return None if found < 0 else found

    def size(self, position: int) -> int:
        """Returns the bytes of one file."""
        return int(self._table["size"][position].as_py())

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return int(pc.sum(self._table["size"]).as_py() or 0)

    @property
    def digest(self) -> str:
        """SHA-256 of all entries."""
        digest = hashlib.sha256()
        for entry in self:
            digest.update(json.dumps(entry).encode() + b"\n")
        return digest.hexdigest()

    def take(self, positions: NDArray[np.int64]) -> "Listing":
        """Returns a listing of the entries at these positions, which must ascend."""
        return Listing(self._table.take(pa.array(positions)))


class Paths(Sequence[str]):
    """The paths of a listing; each becomes a string when it is read."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: Any) -> Any:
        return Paths(self._column[index]) if isinstance(index, slice) else self._column[index].as_py()

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), BATCH):
            yield from self._column.slice(start, BATCH).to_pylist()
