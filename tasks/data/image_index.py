"""The image index of a dataset version: which file, label, group and metadata every packed image has.

It lies beside the manifest, and no digest covers it: a folder, an archive and a bucket of the same images are one
dataset version, and another value in a column of metadata makes no new one. Versions of older code have no index.

    datasets/<version>/index/<sha256>.parquet
    datasets/<version>/index.json               commits it; the last preprocessing of the version decides
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cnn.data.splits import SPLITS, Split
from cnn.formats.block import LabelledImages
from cnn.preprocessing.pack import Packed
from cnn.preprocessing.survey import Plan
from infra.errors import Outage, ServiceError
from infra.machine.files import atomic_file, file_digest
from infra.records import Record
from infra.sources.label_table import META, LabelTable, further_names
from infra.sources.listing import BATCH
from infra.storage import bucket_layout
from infra.storage.object_store import ObjectStore

NO_VALUE = "(none)"

_OWN = pa.schema(
    [
        ("split", pa.string()),
        ("position", pa.int64()),
        ("label", pa.string()),
        ("digest", pa.string()),
        ("path", pa.large_string()),
        ("group", pa.large_string()),
    ]
)


class IndexRecord(Record, extra="forbid"):
    """The commit of an image index."""

    format: Literal[1] = 1
    sha256: str
    """Of the Parquet file."""

    images: int
    columns: tuple[str, ...] = ()
    """Names of the metadata's columns."""

    labels: str | None = None
    """SHA-256 of the label table from which they come."""


class ImageIndex:
    """The packed images of a dataset version: a row per image, in the order of split and position.

    Columns: `split`, `position` in the split, `label` (class name), `digest` (SHA-256 of the content, hexadecimal),
    `path` (None for sources of plain arrays), `group`, and the metadata as `meta.<column>`, all as text or None.
    """

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the metadata's columns."""
        return further_names(self.table.column_names)

    def write_csv(self, path: Path) -> None:
        """Writes all columns; see `with_metadata_of`."""
        own = {name: self.table[name] for name in _OWN.names}
        with atomic_file(path, public=True) as file:
            pa_csv.write_csv(with_metadata_of(self.table, own), file)

    def of_split(self, split: Split) -> pa.Table:
        """Returns the rows of a split, by position."""
        return self.table.filter(pc.equal(self.table["split"], split))

    def paths(self, split: Split) -> list[str | None]:
        """Returns the path of each image of a split."""
        found: list[str | None] = self.of_split(split)["path"].to_pylist()
        return found

    def groups(self, split: Split) -> list[str | None]:
        """Returns the group of each image of a split."""
        found: list[str | None] = self.of_split(split)["group"].to_pylist()
        return found

    def slices(self, split: Split, columns: Iterable[str]) -> dict[str, list[str]]:
        """Returns columns of metadata by name, with one value per image of a split; columns that are missing are not
        there, and a value that is missing is `NO_VALUE`."""
        rows = self.of_split(split)
        wanted = [name for name in columns if META + name in rows.column_names]
        return {name: rows[META + name].fill_null(NO_VALUE).to_pylist() for name in wanted}


def with_metadata_of(index: pa.Table, columns: Mapping[str, pa.ChunkedArray]) -> pa.Table:
    """Returns columns and those of an index's metadata, under their own names where these are not taken."""
    found = dict(columns)
    for column in index.column_names:
        name = column.removeprefix(META)
        if column.startswith(META) and not (name in found and found[name].equals(index[column])):  # as the group's is
            found[column if name in found else name] = index[column]
    return pa.table(found)


def write_index(path: Path, source: LabelledImages, plan: Plan, packed: Packed, labels: LabelTable | None) -> None:
    """Writes the index of a dataset version as a Parquet file; memory holds some thousand rows at a time.

    Args:
        labels: a row per image of the source, in its order.
    """
    assert labels is None or len(labels) == len(source)
    further = labels.further if labels else pa.table({})
    schema = pa.schema([*_OWN, *further.schema])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for number, split in enumerate(SPLITS):
            count = 0
            for start, names in _batches(source.names()):
                chosen = np.flatnonzero(packed.splits[start : start + len(names)] == number)
                rows = start + chosen
                columns = [
                    [split] * len(rows),
                    np.arange(count, count + len(rows)),
                    [source.classes[label] for label in plan.labels[rows].tolist()],
                    [digest.tobytes().hex() for digest in plan.digests[rows]],
                    [names[place] for place in chosen.tolist()],
                    [source.groups[row] for row in rows.tolist()] if source.groups else [None] * len(rows),
                    *(column.combine_chunks() for column in further.take(pa.array(rows)).columns),
                ]
                arrays = [pa.array(column, of.type) for column, of in zip(columns, schema, strict=True)]
                writer.write_table(pa.table(arrays, schema=schema))
                count += len(rows)


def _batches(names: Iterator[str | None]) -> Iterator[tuple[int, list[str | None]]]:
    start = 0
    while batch := list(islice(names, BATCH)):
        yield start, batch
        start += len(batch)


def store_index(store: ObjectStore, version: str, path: Path, labels_sha256: str | None) -> None:
    """Stores an index, and then its commit, which replaces an earlier one.

    Args:
        labels_sha256: see `IndexRecord.labels`.
    """
    opened = pq.ParquetFile(path)
    sha256 = file_digest(path)
    record = IndexRecord(
        sha256=sha256,
        images=opened.metadata.num_rows,
        columns=further_names(opened.schema_arrow.names),
        labels=labels_sha256,
    )
    store.put_file(bucket_layout.image_index(version, sha256), path, sha256=sha256)
    store.put_bytes(bucket_layout.index_record(version), record.model_dump_json().encode())


def replace_columns(store: ObjectStore, version: str, labels: LabelTable | None, labels_sha256: str | None) -> bool:
    """Gives the index of a version the groups and further columns that the label table has now; none without a table.

    Returns:
        Whether it did: not if there is no index, or if it names files of another source of the same images.
    """
    index = load_index(store, version)
    if index is None:
        return False
    group = _OWN.field("group")
    table = index.table.select(_OWN.names)
    groups: list[str | None] = [None] * table.num_rows
    if labels:
        rows = labels.positions(index.table["path"].to_pylist())
        if (rows < 0).any():
            return False
        here = labels.take(rows)
        groups = here.values("group") or groups
        for name in here.further.column_names:
            table = table.append_column(name, here.further[name])
    table = table.set_column(table.schema.get_field_index(group.name), group, pa.array(groups, group.type))
    with TemporaryDirectory() as temporary:
        path = Path(temporary, "index.parquet")
        pq.write_table(table, path, compression="zstd")
        store_index(store, version, path, labels_sha256)
    return True


def read_index_record(store: ObjectStore, version: str) -> IndexRecord | None:
    """Returns the commit of a version's index; None if it has none.

    Raises:
        ServiceError: the store failed, or the commit is damaged.
    """
    remedy = "write it again with --refresh preprocess"
    return store.read_record(bucket_layout.index_record(version), IndexRecord, remedy)


def load_index(store: ObjectStore, version: str) -> ImageIndex | None:
    """Returns the index of a version; None if it has none.

    Raises:
        ServiceError: the store failed, or the index is damaged.
    """
    record = read_index_record(store, version)
    if record is None:
        return None
    try:
        with store.fetched(bucket_layout.image_index(version, record.sha256), sha256=record.sha256) as path:
            return ImageIndex(pq.read_table(path))
    except Outage:  # says nothing about the index
        raise
    except ServiceError as error:
        raise ServiceError(f"{error}; if it is lost, --refresh preprocess writes it again") from error


def index_digest(store: ObjectStore, version: str, columns: Sequence[str]) -> str:
    """Returns the digest of the index from which columns of metadata come; empty without columns, or an index."""
    record = read_index_record(store, version) if columns else None
    return record.sha256 if record else ""


def slice_masks(index: ImageIndex, split: Split, columns: Iterable[str]) -> dict[str, NDArray[np.bool_]]:
    """Returns a mask of a split's images per value of some columns, named `column=value`."""
    found = {name: np.array(values, dtype=object) for name, values in index.slices(split, columns).items()}
    return {f"{name}={value}": of == value for name, of in found.items() for value in sorted(set(of.tolist()))}
