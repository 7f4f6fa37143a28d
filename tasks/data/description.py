"""Describes a dataset version for people and scripts: splits, classes, groups and columns."""

from collections.abc import Mapping

import pyarrow.compute as pc

from cnn.data.splits import SPLITS
from infra.records import Record
from infra.sources.label_table import META
from infra.storage.object_store import ObjectStore
from tasks.data.dataset import load_manifest
from tasks.data.image_index import NO_VALUE, ImageIndex

MAX_VALUES = 1000  # of a column, the most frequent ones


class Description(Record):
    """What a dataset version holds."""

    version: str
    channels: int
    image_size: int
    """Height and width in pixels."""

    splits: dict[str, int]
    """Images of `train`, `val` and `test`."""

    classes: dict[str, dict[str, int]]
    """Images of each class, by split."""

    groups: int
    """Number of groups."""

    columns: dict[str, dict[str, int]]
    """Images per value of each column of metadata, the most frequent value first."""


def describe(store: ObjectStore, version: str, index: ImageIndex) -> Description:
    """Returns the description of a dataset version with an index."""
    manifest = load_manifest(store, version)
    counts: Mapping[str, tuple[int, ...]] = {split: manifest.splits[split].class_counts for split in SPLITS}
    return Description(
        version=version,
        channels=manifest.channels,
        image_size=manifest.image_size,
        splits={split: manifest.splits[split].count for split in SPLITS},
        classes={
            name: {split: counts[split][label] for split in SPLITS} for label, name in enumerate(manifest.classes)
        },
        groups=pc.count_distinct(index.table["group"]).as_py(),
        columns={name: _values(index, name) for name in index.columns},
    )


def _values(index: ImageIndex, column: str) -> dict[str, int]:
    found = pc.value_counts(index.table[META + column].combine_chunks().fill_null(NO_VALUE)).to_pylist()
    found.sort(key=lambda each: (-each["counts"], each["values"]))
    return {each["values"]: each["counts"] for each in found[:MAX_VALUES]}
