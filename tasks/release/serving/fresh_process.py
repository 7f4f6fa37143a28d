"""Uses a registered model in a process that knows only its URI, as an outside user would; clients.py starts it.

    python -P fresh_process.py        with {"uri": …, "images": …, "out": …, "sizes": […], "hidden": […]} on its input

`images` is a folder of PNG files, read in the order of their names. Each of the `sizes` is the size of a batch of the
first images; <out>/predictions.safetensors holds each batch's predictions under its size. The process also sends inputs
that the model must refuse; <out>/refusals.json holds the error messages, or null where no error was raised. Like any
model server, the process cannot import Convoy, nor the user's network: the packages that `hidden` names, even if they
are installed. It loads its libraries before it reads its input.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import mlflow.pyfunc
import numpy as np
import torch.export.pt2_archive  # noqa: F401  # the models need it
from PIL import Image
from safetensors.numpy import save_file


class Hide:
    """Refuses to import some packages; stands before all finders that may know them."""

    def __init__(self, packages: Sequence[str]) -> None:
        self._packages = packages

    def find_spec(self, name: str, *_: object) -> None:
        if name.partition(".")[0] in self._packages:
            raise ModuleNotFoundError(f"the model needs {name}, which its users do not have", name=name)


def main() -> None:
    task = json.loads(sys.stdin.read() or "null")
    if task is None:  # the starting process has ended
        return
    assert not sys.modules.keys() & task["hidden"], "what is hidden is loaded"
    sys.meta_path.insert(0, Hide(task["hidden"]))  # type: ignore[arg-type]
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
            message = str(error).rpartition("Error: ")[2]  # MLflow repeats the whole input before the message
            refusals[name] = " ".join(message.split())[:300] or type(error).__name__
    Path(task["out"], "refusals.json").write_text(json.dumps(refusals))
    batches = {str(size): np.ascontiguousarray(model.predict(images[:size])) for size in task["sizes"]}
    save_file(batches, Path(task["out"], "predictions.safetensors"))


if __name__ == "__main__":
    main()
