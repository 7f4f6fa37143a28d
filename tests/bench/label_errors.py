"""Wrong labels: `convoy errors` against cleanlab on the same probabilities, and what it finds in training images.

python -m tests.bench.label_errors SEED    plants errors, trains as in cnn/README.md, and prints what is found
"""

import gzip
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from torch import nn

from cnn.config.preprocessing import PreprocessConfig
from cnn.config.training import TrainConfig
from cnn.data.manifest import Manifest
from cnn.data.mapped_split import MappedSplit
from cnn.data.shard_writer import shard_path
from cnn.data.splits import SPLITS, Split
from cnn.distributed.process_group import make_deterministic, process_group
from cnn.evaluation.evaluate import predict_logits
from cnn.evaluation.label_errors import find_label_errors
from cnn.networks.wrappers import Normalise
from cnn.preprocessing.pack import preprocess
from cnn.training.loop import fit
from cnn.training.trainer import Trainer
from infra.machine.lifeline import die_with_parent
from tests.bench.comparison import Comparison, Quiet, Side, compare, rate, require

WRONG = 0.03  # share of the labels that is changed, to a random other class
EPOCHS = (12, 40)  # of a training
IMAGES, CLASSES = 200_000, 100  # of the time
GROUPS: Mapping[str, tuple[Split, ...]] = {"training": ("train",), "validation and test": ("val", "test")}

Labels = NDArray[np.int64]


def label_errors(rounds: int) -> Iterator[Comparison]:
    """Wrong labels: the ranking against cleanlab's, and what is found in images that were seen in training.

    A round is a seed of the planted errors: 3 % of the labels of scikit-learn's 1 797 digits.
    """
    require("cleanlab")
    yield from _against_cleanlab(rounds)
    yield _time(rounds)
    yield from _seen_in_training(rounds)


def _against_cleanlab(rounds: int) -> Iterator[Comparison]:
    """Both get the same probabilities, of a logistic regression with five folds: no image is judged by its own."""
    figures: dict[str, tuple[list[float], list[float]]] = {"recall": ([], []), "precision": ([], [])}
    truth = load_digits().target.astype(np.int64)
    for seed in range(rounds):
        labels = _planted(truth, seed)
        model = LogisticRegression(max_iter=300)
        found = cross_val_predict(model, load_digits().data / 16, labels, cv=5, method="predict_proba")
        probabilities = found.astype(np.float32)
        ours, theirs = find_label_errors(probabilities, labels).index, _cleanlab(probabilities, labels)
        print(f"label errors, seed {seed}: {_agreement(ours, theirs)}", file=sys.stderr)
        for side, index in enumerate((ours, theirs)):
            for name, figure in _figures(index, labels != truth).items():
                figures[name][side].append(figure)
    for name, (ours_, theirs_) in figures.items():
        yield _comparison(f"planted errors: {name}", ("convoy", ours_), ("cleanlab", theirs_))


def _time(rounds: int) -> Comparison:
    random = np.random.default_rng(0)
    truth = random.integers(CLASSES, size=IMAGES)
    logits = random.normal(size=(IMAGES, CLASSES)).astype(np.float32)
    logits[np.arange(IMAGES), truth] += 7
    exponentials = np.exp(logits)
    probabilities, labels = exponentials / exponentials.sum(1, keepdims=True), _planted(truth, 0, CLASSES)

    def ranked(found: Labels) -> int:
        assert len(found) > WRONG * IMAGES / 2
        return IMAGES

    sides = (
        Side("convoy", rate(lambda: ranked(find_label_errors(probabilities, labels).index))),
        Side("cleanlab", rate(lambda: ranked(_cleanlab(probabilities, labels)))),
    )
    return compare(f"ranking {IMAGES:,} images, {CLASSES} classes", *sides, rounds=rounds)


def _seen_in_training(rounds: int) -> Iterator[Comparison]:
    for epochs in EPOCHS:
        found = []
        for seed in range(rounds):
            program = [sys.executable, "-m", "tests.bench.label_errors", str(seed), str(epochs)]
            done = subprocess.run(program, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True)
            found.append(json.loads(done.stdout))
        for name in ("recall", "precision"):
            sides = [(group, [each[group][name] for each in found]) for group in reversed(GROUPS)]
            yield _comparison(f"planted errors, {epochs} epochs: {name}", *sides)


def _planted(truth: Labels, seed: int, classes: int = 10) -> Labels:
    random = np.random.default_rng(seed)
    wrong = random.random(len(truth)) < WRONG
    return np.where(wrong, (truth + random.integers(1, classes, len(truth))) % classes, truth)


def _cleanlab(probabilities: NDArray[np.float32], labels: Labels) -> Labels:
    from cleanlab.filter import find_label_issues

    found = find_label_issues(
        labels, probabilities, filter_by="confident_learning", return_indices_ranked_by="normalized_margin", n_jobs=1
    )
    return np.asarray(found, dtype=np.int64)


def _agreement(ours: Labels, theirs: Labels) -> str:
    common = len(np.intersect1d(ours, theirs))
    same = sum(a == b for a, b in zip(ours, theirs, strict=False))
    return f"{len(ours)} listed, cleanlab {len(theirs)}; {common} by both, {same} at the same place"


def _figures(index: Labels, wrong: NDArray[np.bool_]) -> dict[str, float]:
    """Per cent of the planted errors that are listed, and of the listed images that are planted errors."""
    hits = int(wrong[index].sum())
    return {"recall": 100 * hits / int(wrong.sum()), "precision": 100 * hits / max(1, len(index))}


def _comparison(name: str, ours: tuple[str, list[float]], theirs: tuple[str, list[float]]) -> Comparison:
    return Comparison(
        name=name,
        ours_label=ours[0],
        theirs_label=theirs[0],
        unit="%",
        ours=tuple(ours[1]),
        theirs=tuple(theirs[1]),
    )


def main() -> None:
    """Trains on the planted labels, and prints the figures of images that were seen in training, and of the others."""
    die_with_parent(os.getppid())
    table = gzip.decompress(files("sklearn.datasets.data").joinpath("digits.csv.gz").read_bytes()).decode()
    pixels, given = zip(*(line.rsplit(",", 1) for line in table.split()), strict=True)
    truth = np.array([int(float(label)) for label in given])
    make_deterministic()
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary, process_group() as (device, exchange):
        # An image's split and position depend on its pixels only, so both versions have the same images in one order.
        _, right = _pack(Path(temporary, "right"), pixels, truth)
        manifest, splits = _pack(Path(temporary, "planted"), pixels, _planted(truth, int(sys.argv[1])))
        epochs = int(sys.argv[2])
        config = TrainConfig(network={"width": 32}, epochs=epochs, batch_size=64, augment={"flip": False, "shift": 1})
        trainer = Trainer(
            config,
            manifest=manifest,
            train_split=splits["train"],
            val_split=splits["val"],
            device=device,
            exchange=exchange,
        )
        fit(trainer, Quiet())
        trainer.network.load_state_dict(trainer.weights())
        network = nn.Sequential(Normalise(manifest.mean, manifest.std), trainer.network)
        results = {}
        for group, names in GROUPS.items():
            logits = np.concatenate([predict_logits(network, splits[name], device).softmax(1) for name in names])
            labels = np.concatenate([splits[name].labels for name in names])
            wrong = labels != np.concatenate([right[name].labels for name in names])
            results[group] = _figures(find_label_errors(logits, labels).index, wrong)
    print(json.dumps(results))


def _pack(folder: Path, pixels: tuple[str, ...], labels: Labels) -> tuple[Manifest, dict[Split, MappedSplit]]:
    folder.mkdir()
    csv = folder / "digits.csv"
    csv.write_text("".join(f"{row},{label}\n" for row, label in zip(pixels, labels, strict=True)))
    manifest = preprocess("digits", {"digits.csv": csv}, PreprocessConfig(), folder)
    shards = {name: [shard_path(folder, shard.sha256) for shard in manifest.splits[name].shards] for name in SPLITS}
    return manifest, {name: MappedSplit(paths) for name, paths in shards.items()}


if __name__ == "__main__":
    main()
