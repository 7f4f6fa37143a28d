"""Writes the table of predictions batch by batch, as Parquet, CSV or JSON lines; it appears whole or not at all."""

import csv
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from infra.errors import UsageError
from infra.machine.files import check_writable, publish
from infra.records import Record
from infra.storage.object_store import ObjectStore, parse_s3
from tasks.orchestration.retries import outlast

ROW_GROUP_ROWS = 8192  # of Parquet


class Unread(Record):
    """A file that could not be used."""

    file: str
    reason: str


class PredictedBatch(NamedTuple):
    """A batch of decoded files."""

    names: tuple[str, ...]
    images: NDArray[np.uint8]
    """[n, C, H, W], of the readable files."""

    reasons: tuple[str | None, ...]
    """Per file, why it could not be used; two files may have one name."""

    @property
    def unread(self) -> tuple[Unread, ...]:
        """Returns the files that could not be used."""
        named = zip(self.names, self.reasons, strict=True)
        return tuple(Unread(file=name, reason=reason) for name, reason in named if reason is not None)


TableWriter = Callable[[PredictedBatch, NDArray[np.float32]], object]
"""Appends one row per file of a batch, given the probabilities of its readable images."""

WriteRows = Callable[[pa.RecordBatch], object]


def check_out(out: str) -> None:
    """Checks the address of the table, before the work rather than after it.

    Raises:
        UsageError: it cannot be written, or its suffix names no format.
        ServiceError: there is no such bucket, or the object store failed.
    """
    if PurePosixPath(out).suffix.lower() not in (".parquet", ".csv", ".json", ".jsonl"):
        raise UsageError(f"--out {out}: its name must end with .parquet, .csv or .json")
    if out.startswith("s3://"):
        ObjectStore.connect(parse_s3(out)[0], create=False)
    else:
        check_writable(Path(out), "--out")


@contextmanager
def result_file(out: str) -> Iterator[Path]:
    """Yields a temporary path with the same suffix; the file written there appears at `out` if the block succeeds."""
    local = None if out.startswith("s3://") else Path(os.path.realpath(out))  # a link stays one
    with TemporaryDirectory(dir=local and local.parent, prefix=".convoy-") as temporary:
        file = Path(temporary, PurePosixPath(out).name)
        yield file
        if local:
            publish(file, local)
        else:
            bucket, key = parse_s3(out)
            outlast(lambda: ObjectStore.connect(bucket, create=False).put_file(key, file))


@contextmanager
def table_writer(file: Path, classes: Sequence[str]) -> Iterator[TableWriter]:
    """Opens a table for writing, in the format that its suffix names."""
    names = ["file", "class", "probability", *(f"p_{name}" for name in classes), "error"]
    types = [pa.string(), pa.string(), *[pa.float32()] * (1 + len(classes)), pa.string()]
    schema = pa.schema(list(zip(names, types, strict=True)))
    opened = {".parquet": _parquet, ".csv": _csv}.get(file.suffix.lower(), _json_lines)
    with opened(file, schema) as write:
        yield lambda batch, probabilities: write(_rows(batch, probabilities, classes, schema))


def _rows(
    batch: PredictedBatch, probabilities: NDArray[np.float32], classes: Sequence[str], schema: pa.Schema
) -> pa.RecordBatch:
    unread = np.array([reason is not None for reason in batch.reasons])
    best = np.zeros(len(unread), dtype=np.int64)
    table = np.zeros((1 + len(classes), len(unread)), dtype=np.float32)  # highest probability, then one row per class
    best[~unread] = probabilities.argmax(1)
    table[:, ~unread] = np.vstack([probabilities.max(1), probabilities.T])
    named = pa.array(best, mask=unread)
    arrays = [
        pa.array(batch.names, pa.string()),
        pa.array(classes, pa.string()).take(named),
        *(pa.array(row, mask=unread) for row in table),
        pa.array(batch.reasons, pa.string()),
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


@contextmanager
def _csv(file: Path, schema: pa.Schema) -> Iterator[WriteRows]:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)  # pyarrow's writer quotes every text
        writer.writerow(schema.names)
        yield lambda rows: writer.writerows(zip(*(column.to_pylist() for column in rows.columns), strict=True))


@contextmanager
def _json_lines(file: Path, schema: pa.Schema) -> Iterator[WriteRows]:
    with file.open("w", encoding="utf-8") as stream:
        yield lambda rows: stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.to_pylist())


@contextmanager
def _parquet(file: Path, schema: pa.Schema) -> Iterator[WriteRows]:
    waiting: list[pa.RecordBatch] = []
    with pq.ParquetWriter(file, schema) as writer:

        def write(rows: pa.RecordBatch) -> None:
            waiting.append(rows)
            if sum(each.num_rows for each in waiting) >= ROW_GROUP_ROWS:
                writer.write_table(pa.Table.from_batches(waiting))
                waiting.clear()

        yield write
        if waiting:
            writer.write_table(pa.Table.from_batches(waiting))
