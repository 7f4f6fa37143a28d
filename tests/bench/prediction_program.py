"""Predicts files of the working folder: prediction_program.py PROGRAM MODEL IMAGES; prints speed and memory as JSON."""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlflow.pyfunc
import numpy as np
from PIL import Image

from flows.cli.console import servers_to_read

BATCH = 64


def convoy(model: str, images: int) -> None:
    """`convoy predict`, without the start of the command."""
    from tasks.prediction.predict import predict

    assert predict.fn(model, [f"{model}-files"], "table.csv").images == images


def pyfunc(model: str, images: int) -> None:
    """A loop that opens, crops and scales each file, and predicts batches."""
    loaded = mlflow.pyfunc.load_model(f"models:/{model}@champion")
    _, channels, side, _ = loaded.metadata.signature.inputs.inputs[0].shape
    files = sorted(Path(f"{model}-files").iterdir())
    rows = []
    for start in range(0, len(files), BATCH):
        batch = []
        for file in files[start : start + BATCH]:
            with Image.open(file) as opened:
                picture = opened.convert("RGB" if channels == 3 else "L")
            edge = min(picture.size)
            left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
            if picture.size != (side, side):
                picture = picture.resize((side, side), Image.Resampling.BILINEAR, (left, top, left + edge, top + edge))
            batch.append(np.asarray(picture).reshape(side, side, channels).transpose(2, 0, 1))
        rows.append(loaded.predict(np.stack(batch)))
    assert sum(map(len, rows)) == images
    np.savetxt("pyfunc.csv", np.concatenate(rows), delimiter=",")


def bare(model: str, images: int) -> None:
    """The model alone, on one batch."""
    loaded = mlflow.pyfunc.load_model(f"models:/{model}@champion")
    shape = loaded.metadata.signature.inputs.inputs[0].shape[1:]
    batch = np.random.default_rng(0).integers(256, size=(BATCH, *shape), dtype=np.uint8)
    for _ in range(-(-images // BATCH)):
        loaded.predict(batch)


PROGRAMS: dict[str, Callable[[str, int], None]] = {each.__name__: each for each in (convoy, pyfunc, bare)}


def main() -> None:
    program, model, images = sys.argv[1], sys.argv[2], int(sys.argv[3])
    servers_to_read()
    if program == convoy.__name__:
        import tasks.prediction.predict  # noqa: F401  # part of the command's start
    began = time.perf_counter()
    PROGRAMS[program](model, images)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"images_per_second": images / seconds, "peak_mb": peak}))


if __name__ == "__main__":
    main()
