"""`convoy predict` against a plain loop of MLflow's pyfunc on the same files, and against the model alone."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tests.bench.comparison import Comparison, Side, compare
from tests.bench.data import pictures
from tests.bench.servers import convoy_command, convoy_servers, run_command

LET_PASS = ("gate.floor=0", "gate.min_class_recall=0", "serving.http=false", "augment.flip=false")
TRAINED_ON = 160  # images per class
DIFFERENT = 200  # pictures; the files are shifted copies of them


@dataclass(frozen=True)
class Case:
    """Files of one size, and the model that predicts them."""

    name: str
    model: str
    channels: int
    width: int
    height: int
    suffix: str
    side: int
    """Of the model's images, in pixels."""

    images: int

    def write(self, folder: Path, images: int) -> None:
        """Writes files: soft blotches, each shifted by another distance."""
        folder.mkdir(parents=True)
        made = pictures(min(images, DIFFERENT), self.channels, max(self.width, self.height)).numpy()
        for number in range(images):
            pixels = np.roll(made[number % len(made)], number // len(made), axis=2)[:, : self.height, : self.width]
            picture = pixels[0] if self.channels == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0))
            Image.fromarray(picture).save(folder / f"{number}{self.suffix}")


CASES = (
    Case("small", "convoy9", 1, 28, 28, ".png", 28, 100_000),
    Case("photos", "efficientnet_lite0", 3, 640, 480, ".jpg", 128, 5_000),
)


def prediction(rounds: int) -> Iterator[Comparison]:
    """`convoy predict` of 100 000 small and 5 000 photo-sized files against a pyfunc loop, and the model's bare speed.

    All load the model; the bare one predicts one batch again and again. Two threads each.
    """
    with convoy_servers() as (folder, environment):
        for case in CASES:
            for label in ("light", "dark"):
                case.write(folder / case.name / label, TRAINED_ON)
            settings = (f"data.image_size={case.side}", *LET_PASS)
            options = [word for setting in settings for word in ("--set", setting)]
            train = ("train", "--dataset", f"{case.name}/", "--model", case.model, "--epochs", "1", *options)
            run_command(convoy_command(*train), folder, environment)
            case.write(folder / f"{case.name}-files", case.images)
            memory: dict[str, list[float]] = {}

            def side(program: str, case: Case = case, memory: dict[str, list[float]] = memory) -> Side:
                return Side(program, _measure(program, case, folder, environment, memory.setdefault(program, [])))

            for other in ("pyfunc", "bare"):
                ours, theirs = side("convoy"), side(other)
                yield compare(f"predict: {case.name}", ours, theirs, rounds=rounds, warm_up=False)
            yield Comparison(
                name=f"predict: {case.name}",
                ours_label="convoy",
                theirs_label="pyfunc",
                unit="MB at most",
                ours=tuple(memory["convoy"][:rounds]),
                theirs=tuple(memory["pyfunc"]),
            )


def _measure(
    program: str, case: Case, folder: Path, environment: dict[str, str], memory: list[float]
) -> Callable[[], float]:
    command = [sys.executable, "-m", "tests.bench.prediction_program", program, case.name, str(case.images)]
    root = str(Path(__file__).parents[2])

    def measure() -> float:
        found = json.loads(run_command(command, folder, environment | {"PYTHONPATH": root}).splitlines()[-1])
        memory.append(found["peak_mb"])
        return float(found["images_per_second"])

    return measure
