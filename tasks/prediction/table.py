"""The table of predictions, as Parquet, CSV or JSON lines, written batch by batch; it appears whole or not at all."""

import csv
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from infra.errors import UsageError
from infra.machine.files import publish
from infra.records import Record
from infra.storage.object_store import ObjectStore, parse_s3

ROWS = 8192  # of a row group of Parquet


class Unread(Record):
    """A file that could not be used."""

    file: str
    reason: str


class PredictedBatch(NamedTuple):
    """Some files, decoded."""

    names: tuple[str, ...]
    images: NDArray[np.uint8]
    """[n, C, H, W], of the readable ones."""

    unread: tuple[Unread, ...]


class TableWriter(Protocol):
    """Takes predictions, batch by batch."""

    def add(self, batch: PredictedBatch, answers: NDArray[np.float32]) -> None:
        """Append a row for each file of the batch.

        Args:
            answers: probabilities of its readable images.
        """


def check_out(out: str) -> None:
    """Refuse a place for the table before the work, rather than after it.

    Raises:
        UsageError: nothing can be written there, or its ending names no format.
    """
    if PurePosixPath(out).suffix.lower() not in (".parquet", ".csv", ".json", ".jsonl"):
        raise UsageError(f"--out {out}: its name must end with .parquet, .csv or .json")
    if out.startswith("s3://"):
        parse_s3(out)
    elif Path(out).is_dir() or not os.access(Path(out).absolute().parent, os.W_OK):
        raise UsageError(f"--out {out}: cannot write there; name a file in a folder that exists")


@contextmanager
def result_file(out: str) -> Iterator[Path]:
    """Yield a temporary path of the same ending; what is written there appears at `out` if the block succeeds."""
    local = None if out.startswith("s3://") else Path(out).absolute()
    with TemporaryDirectory(dir=local and local.parent, prefix=".convoy-") as temporary:
        file = Path(temporary, PurePosixPath(out).name)
        yield file
        if local:
            publish(file, local)
        else:
            bucket, key = parse_s3(out)
            ObjectStore.connect(bucket, create=False).put_file(key, file)


@contextmanager
def table_writer(file: Path, classes: Sequence[str]) -> Iterator[TableWriter]:
    """Open a table for writing; the ending of its name says in which format."""
    with ExitStack() as stack:
        match file.suffix.lower():
            case ".parquet":
                yield stack.enter_context(closing(_Parquet(file, classes)))
            case ".csv":
                yield _Csv(stack.enter_context(file.open("w", newline="", encoding="utf-8")), classes)
            case _:
                yield _JsonLines(stack.enter_context(file.open("w", encoding="utf-8")), classes)


def _rows(batch: PredictedBatch, answers: NDArray[np.float32], classes: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Values of all columns, in order."""
    reasons = {each.file: each.reason for each in batch.unread}
    best, readable = answers.argmax(1), 0
    for name in batch.names:
        if name in reasons:
            yield (name, None, None, *(None for _ in classes), reasons[name])
        else:
            row = answers[readable]
            yield (name, classes[best[readable]], float(row[best[readable]]), *map(float, row), None)
            readable += 1


def columns(classes: Sequence[str]) -> list[str]:
    """Names of the table's columns."""
    return ["file", "class", "probability", *(f"p_{name}" for name in classes), "error"]


class _Csv:
    def __init__(self, stream: Any, classes: Sequence[str]) -> None:
        self._writer, self._classes = csv.writer(stream), classes
        self._writer.writerow(columns(classes))

    def add(self, batch: PredictedBatch, answers: NDArray[np.float32]) -> None:
        self._writer.writerows(_rows(batch, answers, self._classes))


class _JsonLines:
    def __init__(self, stream: Any, classes: Sequence[str]) -> None:
        self._stream, self._classes = stream, classes

    def add(self, batch: PredictedBatch, answers: NDArray[np.float32]) -> None:
        names = columns(self._classes)
        for row in _rows(batch, answers, self._classes):
            self._stream.write(json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) + "\n")


class _Parquet:
    def __init__(self, file: Path, classes: Sequence[str]) -> None:
        self._classes = classes
        types = [pa.string(), pa.string(), *[pa.float32()] * (1 + len(classes)), pa.string()]
        self._schema = pa.schema(list(zip(columns(classes), types, strict=True)))
        self._writer = pq.ParquetWriter(file, self._schema)
        self._waiting: list[tuple[Any, ...]] = []

    def add(self, batch: PredictedBatch, answers: NDArray[np.float32]) -> None:
        self._waiting += _rows(batch, answers, self._classes)
        if len(self._waiting) >= ROWS:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._waiting:
            arrays = [
                pa.array(values, field.type)
                for values, field in zip(zip(*self._waiting, strict=True), self._schema, strict=True)
            ]
            self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
            self._waiting = []
