"""Applies the labels that a person has corrected in a table of `convoy errors` to the label table of all images."""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from unicodedata import normalize

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from infra.errors import UsageError, counted, escaped
from infra.machine.files import atomic_file
from infra.records import Record
from infra.sources.entries import is_table
from infra.sources.label_table import LabelTable, TableOptions, read_table

UNNAMED = "have no file names: their source is not a folder or table of files"


class Corrected(Record):
    """A written label table of all images."""

    model: str
    """`name/version`."""

    name: str
    """Of the model."""

    images: int
    changed: int
    """Images whose label is another one now."""

    missing: str | None
    """A path of the table that leads to no file from where the table is; None if it does."""


def read_corrections(file: Path) -> LabelTable:
    """Reads the label table that a person has edited; only its paths and labels matter.

    Raises:
        UsageError: there is none, or rows are faulty; the message names them.
    """
    if not os.path.isfile(file) or not is_table(file.name):
        raise UsageError(f"--corrected {file}: there is no such table; name the .csv that `convoy errors` has written")
    return read_table(file, str(file), TableOptions())


def write_corrected(model: str, corrections: LabelTable, out: Path, options: TableOptions) -> Corrected:
    """Writes the label table of all images of a version's dataset version, with their splits and corrected labels.

    Args:
        model: `name` (its champion), `name@alias` or `name/version`.
        out: the table, as CSV; replaced if it exists and all its rows are in the new one.
        options: names of the table's columns.

    Raises:
        UsageError: there is no such version, its images have no names, a correction names no image or class, or rows
            of `out` would be lost.
        ServiceError: MLflow or the object store failed.
    """
    from infra.storage.object_store import open_bucket
    from infra.tracking.promotion_history import find_model
    from tasks.data.dataset import dataset_of
    from tasks.data.dataset_diff import index_of

    store = open_bucket()
    version = find_model(store, model)
    manifest = dataset_of(store, version)
    index = index_of(store, manifest.version).table
    if index["path"].null_count:
        raise UsageError(f"the images of {version.address} {UNNAMED}")
    table, changed = corrected_table(index, corrections, manifest.classes, options)
    _check_replaced(out, index, version.address, options)
    with atomic_file(out, public=True) as temporary:
        pa_csv.write_csv(table, temporary)
    first = str(index["path"][0])
    there = "://" in first or os.path.lexists(out.parent / first)
    return Corrected(
        model=version.address,
        name=version.name,
        images=table.num_rows,
        changed=changed,
        missing=None if there else first,
    )


def _check_replaced(out: Path, index: pa.Table, model: str, options: TableOptions) -> None:
    """Refuses to lose rows of an existing table, such as those of files that `data.limit` left out."""
    if not out.exists() or out.stat().st_size == 0:
        return
    try:
        there = read_table(out, str(out), options, labelled=False)
    except UsageError as error:
        raise UsageError(f"--out would replace a file that is no label table; name another one ({error})") from None
    kept = set(index["path"].to_pylist())
    if lost := [path for path in there.required("path") if path not in kept]:
        raise UsageError(
            f"--out {out} has {counted(len(lost), 'row')} of images that {model} was not trained with, such as "
            f"{escaped(lost[0])}; name another file"
        )


def corrected_table(
    index: pa.Table, corrections: LabelTable, classes: Sequence[str], options: TableOptions
) -> tuple[pa.Table, int]:
    """Returns an image index as a label table with corrected labels, and the number of changed labels.

    Its columns are path, label, split, group if any image has one, and the source's further columns.

    Raises:
        UsageError: a correction names no image of the index, or no class.
    """
    from tasks.data.image_index import with_metadata_of

    paths = corrections.required("path")
    labels = [normalize("NFC", label) for label in corrections.required("label")]  # as classes are named
    known = set(index["path"].filter(pc.is_in(index["path"], pa.array(paths, pa.large_string()))).to_pylist())
    for row, path, label in zip(corrections.rows, paths, labels, strict=True):
        if path not in known:
            raise UsageError(f"row {row} of the corrections: the model's data have no image {path}")
        if label not in classes:
            near = difflib.get_close_matches(label, classes, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(classes)}"
            raise UsageError(f"row {row} of the corrections: no class is called {label!r}; {hint}")
    places = pc.index_in(index["path"], value_set=pa.array(paths, pa.large_string()))
    label = pc.coalesce(pa.chunked_array([pa.array(labels, pa.string())]).take(places), index["label"])
    columns = {options.path: index["path"], options.label: label, options.split: index["split"]}
    if index["group"].null_count < index.num_rows:
        columns[options.group] = index["group"]
    return with_metadata_of(index, columns), pc.sum(pc.not_equal(label, index["label"])).as_py()
