"""Compares two dataset versions image by image, by their indexes."""

import csv
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from infra.errors import UsageError
from infra.machine.files import atomic_file
from infra.storage.object_store import ObjectStore
from tasks.data.image_index import ImageIndex, load_index

KINDS = {
    "added": "added",
    "removed": "removed",
    "renamed": "renamed, with the same content",
    "changed": "with other content",
    "relabelled": "relabelled",
    "moved": "moved to another split",
}
"""Kinds of changes, with their words for people."""

COLUMNS = ["path", "digest", "label", "split"]
"""Of an index: those by which images are compared."""


class Change(NamedTuple):
    """A change of one image; an image may have several."""

    kind: str
    path: str
    """In the later version, or in the earlier one if it was removed; the content's digest if it has no path."""

    earlier: str
    """What it was: label, split or path, by the kind of change; the label of a removed image."""

    later: str
    """What it is; the label of an added image."""


class _Image(NamedTuple):
    digest: str
    label: str
    split: str


def differences(earlier: ImageIndex, later: ImageIndex) -> list[Change]:
    """Returns the changes from one version to another, by kind and path.

    An image is found again by its path, and if that is gone, by its content.
    """
    old, new = (_by_path(each) for each in _without_equal_rows(earlier.table, later.table))
    gone = defaultdict[str, list[str]](list)  # by content
    for path in sorted(old.keys() - new.keys(), reverse=True):
        gone[old[path].digest].append(path)
    pairs, changes = [(path, path) for path in new if path in old], []
    for path in sorted(new.keys() - old.keys()):
        if found := gone.get(new[path].digest):
            pairs.append((found.pop(), path))
        else:
            changes.append(Change("added", path, "", new[path].label))
    changes += [Change("removed", path, old[path].label, "") for paths in gone.values() for path in paths]
    for was, path in pairs:
        before, after = old[was], new[path]
        values = (
            ("renamed", was, path),
            ("changed", before.digest, after.digest),
            ("relabelled", before.label, after.label),
            ("moved", before.split, after.split),
        )
        changes += [Change(kind, path, a, b) for kind, a, b in values if a != b]
    order = list(KINDS)
    return sorted(changes, key=lambda change: (order.index(change.kind), change.path))


def _without_equal_rows(*tables: pa.Table) -> Iterator[pa.Table]:
    """Yields what differs of both tables: of millions of images few, which then fit into Python's objects."""
    rows, separator = [table.select(COLUMNS) for table in tables], pa.scalar("\0", pa.large_string())
    as_text = [
        pc.binary_join_element_wise(*(column.cast(pa.large_string()) for column in each.columns), separator)
        for each in rows
    ]  # null without a path: such an image is looked for by its content
    for each, text, other in zip(rows, as_text, reversed(as_text), strict=True):
        yield each.filter(pc.invert(pc.is_in(text, value_set=other.combine_chunks(), skip_nulls=True)))


def _by_path(table: pa.Table) -> dict[str, _Image]:
    """Returns the images by path; those without one by their content, and by a number among equal ones."""
    seen = Counter[str]()
    images = {}
    for batch in table.to_batches():
        for path, digest, label, split in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            seen[digest] += path is None
            images[path or f"{digest}#{seen[digest]}"] = _Image(digest, label, split)
    return images


def summary(changes: Iterable[Change]) -> str:
    """Returns how many images were added, removed, and so on, as a line."""
    counts = Counter(change.kind for change in changes)
    return ", ".join(f"{counts[kind]:,} {words}" for kind, words in KINDS.items() if counts[kind]) or "no change"


def write_changes(changes: Iterable[Change], out: Path) -> None:
    """Writes the changes as CSV, one per row."""
    with atomic_file(out, public=True) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Change._fields)
        writer.writerows(changes)


def index_of(store: ObjectStore, version: str) -> ImageIndex:
    """Returns the index of a dataset version.

    Raises:
        UsageError: it has none.
        ServiceError: the store failed, or the index is damaged.
    """
    index = load_index(store, version)
    if index is None:
        raise UsageError(
            f"dataset version {version} has no index of its images, since older code made it; "
            "`--refresh preprocess` makes it again, with one"
        )
    return index
