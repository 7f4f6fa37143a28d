"""Looks for wrong labels with a registered version: ranks the images of its dataset version, as a table and a page."""

import csv
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cnn.data.splits import SPLITS, Split
from cnn.evaluation.label_errors import LabelErrors, find_label_errors
from infra.machine.files import atomic_file
from infra.storage.object_store import open_bucket
from infra.tracking.promotion_history import find_model
from infra.tracking.served_model import ServedModel
from tasks.data.dataset import dataset_of, open_cache, open_split
from tasks.data.image_index import ImageIndex, load_index
from tasks.orchestration.progress import progress
from tasks.prediction.label_errors_page import FoundLabelErrors, Suspect, label_errors_page
from tasks.prediction.predict import calibrated

if TYPE_CHECKING:
    from cnn.data.split_reader import SplitReader

COLUMNS = ("path", "label", "suggested", "score", "split", "position")

GROUPS: tuple[tuple[Split, ...], ...] = (("train",), ("val", "test"))
"""Splits that share thresholds: the network is surer of images that it was trained on."""


def write_label_errors(model: str, out: Path) -> FoundLabelErrors:
    """Writes a table (CSV) and a page of the images whose label is probably wrong, the most probable first.

    All images of the version's dataset version are predicted by the registered version. Its temperature calibrates
    the probabilities.

    Args:
        model: `name` (its champion), `name@alias` or `name/version`.
        out: the table; the page lies beside it, as `.html`. Both are replaced if they exist.

    Raises:
        UsageError: there is no such version, or the bucket has lost its images.
        ServiceError: MLflow or the object store failed.
    """
    store = open_bucket()
    version = find_model(store, model)
    manifest = dataset_of(store, version)
    index = load_index(store, manifest.version)
    cache = open_cache(store)
    splits = {split: open_split(cache, manifest, split) for split in SPLITS}
    served = ServedModel(version)
    suspects: list[Suspect] = []
    with progress(
        f"Looking for wrong labels with {version.address}", sum(map(len, splits.values())), unit="images"
    ) as advance:
        for group in GROUPS:
            readers = [splits[split] for split in group]
            with _probabilities(cache.root, readers, len(manifest.classes)) as room:
                labels = _predict(served, version.temperature, readers, room, advance)
                found = find_label_errors(room, labels)
            suspects += named(found, {split: len(splits[split]) for split in group}, manifest.classes, index)
    suspects.sort(key=lambda each: -each.score)
    result = FoundLabelErrors(
        model=version.address,
        name=version.name,
        images={split: len(splits[split]) for split in SPLITS},
        suspects={split: sum(each.split == split for each in suspects) for split in SPLITS},
        named=any(each.path for each in suspects) or not suspects,
        table=out,
        page=out.with_suffix(".html"),
    )
    with atomic_file(result.page, public=True) as file:
        file.write_text(label_errors_page(result, suspects, splits), encoding="utf-8")
    with atomic_file(out, public=True) as file:
        write_table(file, suspects)
    return result


@contextmanager
def _probabilities(folder: Path, readers: Sequence["SplitReader"], classes: int) -> Iterator[NDArray[np.float32]]:
    """Yields room for probabilities of all images [N, K], in a file without a name, so that memory need not hold them.

    Raises:
        OSError: the disk is full.
    """
    shape = (sum(map(len, readers)), classes)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, 4 * max(1, shape[0] * shape[1]))  # a mapped page may not lack a disk block
        yield np.memmap(file, np.float32, "r+", shape=shape)


def _predict(
    served: ServedModel,
    temperature: float,
    readers: Sequence["SplitReader"],
    room: NDArray[np.float32],
    advance: Callable[[int], object],
) -> NDArray[np.int64]:
    """Writes the calibrated probabilities of all images into `room`; returns their labels."""
    from cnn.evaluation.evaluate import eval_batch

    labels, start = np.empty(len(room), dtype=np.int64), 0
    for reader in readers:
        for images, its in reader.blocks(eval_batch(reader)):
            stop = start + len(its)
            room[start:stop] = calibrated(served.predict(images.numpy()), temperature)
            labels[start:stop] = its.numpy()
            advance(len(its))
            start = stop
    return labels


def named(
    found: LabelErrors, images: Mapping[Split, int], classes: Sequence[str], index: ImageIndex | None
) -> Iterator[Suspect]:
    """Yields the images that were found among the images of some splits, in their order, with their paths.

    Args:
        images: the number of images of each split that was searched, in the order in which they were.
        index: None if the dataset version has none.
    """
    scores = found.score
    start = 0
    for split, count in images.items():
        rows = np.flatnonzero((start <= found.index) & (found.index < start + count))
        positions = found.index[rows] - start
        paths = [None] * len(rows) if index is None else index.of_split(split)["path"].take(positions).to_pylist()
        for row, position, path in zip(rows.tolist(), positions.tolist(), paths, strict=True):
            yield Suspect(
                split,
                position,
                path or "",
                classes[found.given[row]],
                float(found.given_probability[row]),
                classes[found.suggested[row]],
                float(found.suggested_probability[row]),
                float(scores[row]),
            )
        start += count


def write_table(file: Path, suspects: Sequence[Suspect]) -> None:
    """Writes the rows of `COLUMNS`. The table is a label table: `label` is the given label."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(COLUMNS)
        for each in suspects:
            row = (each.path, each.given, each.suggested, f"{each.score:.6f}", each.split, each.position)
            writer.writerow(row)
