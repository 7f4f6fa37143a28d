"""Recipe `photos` on a folder of photographs, against what an expert writes by hand around timm."""

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

from cnn.networks.published import published_weights
from infra.settings import Settings
from infra.sources.weights import read_first_use
from infra.stack.local_stack import running
from infra.storage import bucket_layout
from infra.storage.object_store import open_bucket
from tasks.config.run import load_config
from tasks.evaluation.paired import lower_bound
from tests.bench.comparison import Comparison, LeftOut
from tests.bench.servers import REFUSED, convoy_command, convoy_servers, run_command

RECIPE = "photos"


@dataclass(frozen=True)
class Figures:
    """What one training gave."""

    right: dict[str, bool]
    """Whether each photograph of the test folder is classified correctly, by its path in there."""

    minutes: float
    """From the start of the command to its end: all that it does."""

    images_per_second: float

    @property
    def accuracy(self) -> float:
        """Per cent of the test photographs."""
        return 100 * sum(self.right.values()) / len(self.right)


def photos(rounds: int, data: Path | None = None) -> Iterator[Comparison]:
    """Recipe `photos` against a plain timm loop, once convoy9 without weights, on `--data`; seeds are rounds."""
    if data is None or not (data / "test").is_dir():
        raise LeftOut("needs --data FOLDER, with train, validation and test folders of class folders")
    with convoy_servers() as (folder, environment):
        weights: Path | None = None
        ours, theirs, scratch = list[Figures](), list[Figures](), list[Figures]()

        def convoy(*arguments: str) -> None:
            run_command(convoy_command(*arguments), folder, environment, (0, REFUSED))

        for seed in range(rounds):
            ours.append(_convoy(convoy, folder, data, seed, recipe=RECIPE))
            weights = weights or _weights(folder, environment)
            theirs.append(_timm_loop(data, weights, seed))
            scratch = scratch or [_convoy(convoy, folder, data, seed)]
    _print_interval(ours, theirs)
    table = partial(_comparison, ours=ours)
    yield table("test accuracy", "timm loop", theirs, "%", "accuracy")
    yield table("the whole command", "timm loop", theirs, "min", "minutes")
    yield table("training steps", "timm loop", theirs, "img/s", "images_per_second")
    yield _comparison("test accuracy", "convoy9, no weights", scratch, "%", "accuracy", ours=ours[:1])


def _comparison(
    what: str, label: str, theirs: list[Figures], unit: str, field: str, *, ours: list[Figures]
) -> Comparison:
    return Comparison(
        name=f"photos: {what}",
        ours_label="recipe photos",
        theirs_label=label,
        unit=unit,
        ours=tuple(getattr(each, field) for each in ours),
        theirs=tuple(getattr(each, field) for each in theirs),
    )


def _convoy(convoy: Callable[..., None], folder: Path, data: Path, seed: int, *, recipe: str | None = None) -> Figures:
    """Trains by the command, and has the version predict the photographs of the test folder."""
    name = f"{recipe or 'scratch'}-{seed}"
    options = ("--name", name, "--set", f"seed={seed}", *(("--recipe", recipe) if recipe else ()))
    began = time.perf_counter()
    convoy("train", "--dataset", str(data), *options, "--summary", "summary.json")
    minutes = (time.perf_counter() - began) / 60
    summary = json.loads((folder / "summary.json").read_text())
    convoy("predict", f"{name}/1", str(data / "test"), "--out", "table.csv")
    with (folder / "table.csv").open(newline="") as file:
        chosen = {Path(row["file"]): row["class"] for row in csv.DictReader(file)}
    right = {str(path.relative_to(data / "test")): path.parent.name == label for path, label in chosen.items()}
    return Figures(right, minutes, summary["images_per_second"])


def _weights(folder: Path, environment: Mapping[str, str]) -> Path:
    """Fetches the published weights that the recipe has used from the bucket."""
    with patch.dict(os.environ, environment):
        running(Settings()).apply()
        used = read_first_use(open_bucket(), published_weights(load_config(None, recipe=RECIPE).model).name)
        assert used
        open_bucket().get_file(bucket_layout.pretrained_weights(used.sha256), folder / "weights.safetensors")
    return folder / "weights.safetensors"


def _timm_loop(data: Path, weights: Path, seed: int) -> Figures:
    config = load_config(None, [f"seed={seed}"], {"dataset": str(data)}, recipe=RECIPE)
    settings = {"config": config.training().model_dump(mode="json"), "image_size": config.data.image_size}
    program = [sys.executable, "-m", "tests.bench.photos_program", str(data), str(weights)]
    began = time.perf_counter()
    done = subprocess.run([*program, json.dumps(settings)], check=True, capture_output=True, text=True)
    minutes = (time.perf_counter() - began) / 60
    result = json.loads(done.stdout)
    right = {name: Path(name).parent.name == label for name, label in result["predictions"].items()}
    return Figures(right, minutes, result["images_per_second"])


def _print_interval(ours: list[Figures], theirs: list[Figures]) -> None:
    """Prints the interval (95 %) of the difference of accuracies, over the test photographs of all seeds."""
    pairs = [(a.right[name], b.right[name]) for a, b in zip(ours, theirs, strict=True) for name in a.right]
    wins, losses = pairs.count((True, False)), pairs.count((False, True))
    low = 100 * lower_bound(wins, losses, len(pairs), 0.025)
    high = -100 * lower_bound(losses, wins, len(pairs), 0.025)
    print(f"photos: paired difference {low:+.1f} to {high:+.1f} points, {len(pairs)} predictions", file=sys.stderr)
