"""A stranger's use of a registered model, whose address is all it knows; clients.py runs it.

    python -P fresh_process.py        with {"uri": …, "images": …, "out": …, "sizes": […]} as its standard input

`images` is a folder of PNG files, taken in the order of their names. For each of the `sizes`, that many of the first go
in as one batch; <out>/predictions.safetensors has each batch's predictions under that number. It also tries inputs that
the model should refuse; <out>/refusals.json has the first line of each error, or null where there was none. It knows
nothing of Convoy, like any model server; it loads its libraries before it is told what to do.
"""

import json
import sys
from pathlib import Path

import mlflow.pyfunc
import numpy as np
import torch.export.pt2_archive  # noqa: F401  # which the models need
from PIL import Image
from safetensors.numpy import save_file


def main() -> None:
    task = json.loads(sys.stdin.read() or "null")
    if task is None:  # whoever was to ask is gone
        return
    pixels = [np.asarray(Image.open(file)) for file in sorted(Path(task["images"]).glob("*.png"))]
    images = np.stack([plane[None] if plane.ndim == 2 else plane.transpose(2, 0, 1) for plane in pixels])
    model = mlflow.pyfunc.load_model(task["uri"])
    wrong = {
        "another height": images[:, :, 1:],
        "another number of channels": np.concatenate([images, images[:, :1]], axis=1),
        "no batch": images[0],
        "floats": (images / 255).astype(np.float32),
        "text": np.array(["an image"]),
    }
    refusals: dict[str, str | None] = {}
    for name, value in wrong.items():
        try:
            model.predict(value)
            refusals[name] = None
        except Exception as error:
            said = str(error).rpartition("Error: ")[2]  # MLflow repeats the whole input before it says what is wrong
            refusals[name] = " ".join(said.split())[:300] or type(error).__name__
    Path(task["out"], "refusals.json").write_text(json.dumps(refusals))
    batches = {str(size): np.ascontiguousarray(model.predict(images[:size])) for size in task["sizes"]}
    save_file(batches, Path(task["out"], "predictions.safetensors"))


if __name__ == "__main__":
    main()
