"""Joins label tables with layouts: what a table says of the files of a folder, and what the class folders say."""

import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cnn.config.preprocessing import PreprocessConfig
from cnn.errors import InputError
from cnn.formats.layout import Given, arrange, arrange_given
from infra.errors import UsageError, counted
from infra.sources.entries import METADATA
from infra.sources.folder import FolderSource
from infra.sources.label_table import MAX_NAME, META, LabelTable, TableOptions
from infra.sources.labelled import TableLocation, with_metadata
from infra.sources.location import LocalLocation

MAX_SLICES = 1000  # values of a column


def images_of(folder: FolderSource, dataset: str, options: TableOptions | None = None) -> FolderSource:
    """Returns the folder reduced to its usable images, with remarks about the rest, which is not uploaded.

    A table `metadata.csv` beside the class folders adds its columns.

    Raises:
        UsageError: the images are not in class folders, or a label table is faulty.
    """
    try:
        if folder.labels:
            arrange_given(given_by(folder.labels))
            return folder
        layout = arrange(folder.files.paths, folder.folders, folder.unreachable)
        found = with_metadata(folder, layout.root, options or TableOptions())
        if found is None:
            return folder.only(layout.chosen, layout.left_out.remarks, layout.left_out.classes)
        folder, table = found
        layout = arrange(folder.files.paths, folder.folders, folder.unreachable)
    except InputError as error:
        raise UsageError(f"{dataset}: {error}") from error
    folder = folder.only(layout.chosen, layout.left_out.remarks, layout.left_out.classes)
    paths = [path[len(layout.root) :] for path in folder.files.paths]
    rows = table.positions(paths)
    if not (rows >= 0).any():
        raise UsageError(f"{METADATA} names none of the images; its paths must be relative to its folder")
    from tasks.orchestration.progress import run_logger  # only here: it loads Prefect, and `data check` needs none

    if strangers := len(table) - int((rows >= 0).sum()):
        run_logger().warning("%s: %s of %s name no image of the folder", dataset, counted(strangers, "row"), METADATA)
    if labels := table.values("label"):
        _check_agreement(labels, table.rows, rows, [layout.classes[label] for label in layout.labels])
    return replace(folder, labels=table.for_files(paths))


def missing_files(table: LabelTable, file: Path) -> list[tuple[int, str]]:
    """Returns the rows of a local label table whose files are missing, with their paths."""
    location = TableLocation(LocalLocation(file.absolute().parent), f"file:{file.absolute()}")
    paths = table.required("path")
    entries = zip(location.entries(paths), table.rows, paths, strict=True)
    return sorted((row, path) for entry, row, path in entries if entry is None)


def table_options(config: PreprocessConfig) -> TableOptions:
    """Returns how a label table is read."""
    columns = config.columns.model_dump()
    if config.group:
        columns["group"] = config.group
    return TableOptions(**columns, needs_group=bool(config.group), max_missing=config.max_unreadable)


def given_by(table: LabelTable) -> Given:
    """Returns what a label table says of its files."""
    return Given(labels=table.values("label"), splits=table.values("split"), groups=table.values("group"))  # type: ignore[arg-type]


def _check_agreement(labels: list[str | None], numbers: list[int], rows: NDArray[np.int64], classes: list[str]) -> None:
    """Raises UsageError if the table beside class folders has another label for an image than its folder."""
    for row, name in zip(rows.tolist(), classes, strict=True):
        label = labels[row] if row >= 0 else name
        if label is not None and unicodedata.normalize("NFC", label) != name:
            raise UsageError(
                f"{METADATA}: row {numbers[row]} has the label {label!r}, but the image is in the class folder {name}; "
                f"correct one, or give {METADATA} itself as the dataset, whose labels count then"
            )


def check_columns(labels: LabelTable | None, dataset: str, config: PreprocessConfig) -> None:
    """Raises UsageError if a column that the configuration names is missing, or has too many values for slices."""
    known = labels.columns if labels else ()
    for key, names in (("data.group", [config.group] if config.group else []), ("data.slices", config.slices)):
        if missing := next((name for name in names if name not in known), None):
            have = f"its columns are {', '.join(known)}" if known else "it has none: they come from a label table"
            raise UsageError(f"{key} names the column {missing!r}, which {dataset} lacks; {have}")
    for name in config.slices:
        values = set(filter(None, labels.values(META + name) or ())) if labels else set()
        longest = max(map(len, values), default=0)
        if len(values) > MAX_SLICES or longest > MAX_NAME:
            what = f"{len(values):,} values" if len(values) > MAX_SLICES else f"a value of {longest:,} characters"
            raise UsageError(
                f"data.slices names the column {name!r}, which has {what} in {dataset}; at most {MAX_SLICES:,} values "
                f"of {MAX_NAME} characters are allowed, so give numbers as ranges, such as '10-20'"
            )
