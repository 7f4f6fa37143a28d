"""Describes the use of an exported file: metadata that every format carries, and examples from an image to a class.

A file must be usable where Convoy is not installed, so nothing here may need it, apart from `example_with_convoy`.
"""

import json
from collections.abc import Callable

from cnn.config.preprocessing import Resize
from cnn.data.manifest import Record
from cnn.formats.decode import Target

SQUARES: dict[Resize, str] = {
    "crop": """\
side = min(image.size)
left, top = (image.width - side) // 2, (image.height - side) // 2
image = image.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
""",
    "pad": """\
image = ImageOps.contain(image, (size, size), Image.Resampling.BILINEAR)
mean = image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
image = ImageOps.pad(image, (size, size), color=mean)
""",
    "squash": """\
image = image.resize((size, size), Image.Resampling.BILINEAR)
""",
}
"""Code that makes `image` a square of `size`, as `cnn.formats.decode.fit` does."""

_SQUARES_IN_WORDS: dict[Resize, str] = {
    "crop": "resize its centre square to {size} by {size} pixels",
    "pad": "resize it to fit into {size} by {size} pixels, in the middle of a square of its mean colour",
    "squash": "resize it to {size} by {size} pixels, which changes its proportions",
}

_READ_METADATA = """\
classes, expected, temperature = (json.loads(about[key]) for key in ("classes", "input", "temperature"))
size, mode = expected["size"], expected["mode"]
"""


def prepare(resize: Resize) -> str:
    """Returns code from an image file to `images`, given `size` and `mode`."""
    return f"""\
image = Image.open("photo.jpg")  # a transparent or 16-bit image needs more steps
image.draft(None, (2 * size, 2 * size))  # decodes a large JPEG as it was decoded for training
image = ImageOps.exif_transpose(image).convert(mode)
{SQUARES[resize]}\
images = np.array(image).reshape(1, size, size, -1).transpose(0, 3, 1, 2)  # uint8 [batch, channel, height, width]
"""


ANSWER = """\
calibrated = probabilities[0] ** (1 / temperature)
calibrated /= calibrated.sum()
print(classes[calibrated.argmax()], calibrated.max())
"""


def pt2_example(resize: Resize) -> str:
    """Returns code that uses a pt2 file, from an image file to a class."""
    return f"""\
import json

import numpy as np
import torch
from PIL import Image, ImageOps

about = dict.fromkeys(("classes", "input", "temperature"), "")
program = torch.export.load("model.pt2", extra_files=about)
{_READ_METADATA}
{prepare(resize)}
probabilities = program.module()(torch.from_numpy(images)).numpy()
{ANSWER}"""


def onnx_example(resize: Resize) -> str:
    """Returns code that uses an ONNX file, from an image file to a class."""
    return f"""\
import json

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession("model.onnx")
about = session.get_modelmeta().custom_metadata_map
{_READ_METADATA}
{prepare(resize)}
(probabilities,) = session.run(["probabilities"], {{"images": images}})
{ANSWER}"""


def convoy9_example(resize: Resize) -> str:
    """Returns code that uses a safetensors file of a convoy9 network, from an image file to a class."""
    return f"""\
import json

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import safe_open
from torch.nn import functional as F

with safe_open("model.safetensors", framework="pt") as file:
    about, weights = file.metadata(), {{name: file.get_tensor(name) for name in file.keys()}}
{_READ_METADATA}

def layer(maps, name):  # a convolution, in some layers max pooling, batch norm, ReLU
    maps = F.conv2d(maps, weights[f"{{name}}.0.weight"], padding=1)
    pooled = f"{{name}}.2.bias" in weights
    maps, norm = (F.max_pool2d(maps, 2), f"{{name}}.2") if pooled else (maps, f"{{name}}.1")
    values = (weights[f"{{norm}}.{{value}}"] for value in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(maps, *values).relu()


def network(maps):
    maps = layer(maps, "stem")
    for stage in ("stage1", "stage2"):
        maps = layer(maps, f"{{stage}}.0")
        maps = maps + layer(layer(maps, f"{{stage}}.1.body.0"), f"{{stage}}.1.body.1")
    return F.linear(layer(maps, "head").amax((2, 3)), weights["linear.weight"], weights["linear.bias"])


{prepare(resize)}
described = json.loads(about["convoy"])
mean, std = (torch.tensor(described[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
maps = (torch.from_numpy(images) / 255 - mean) / std.clamp_min(1e-6)
logits = network(maps)
if described["config"]["test_flip"]:
    logits = (logits + network(maps.flip(3))) / 2
probabilities = logits.softmax(1).numpy()
{ANSWER}"""


def example_with_convoy(resize: Resize) -> str:
    """Returns code that uses a safetensors file of any network, by Convoy's own code, which reads any image file."""
    return f"""\
import json
from pathlib import Path

import torch
from safetensors import safe_open

from cnn.formats.decode import Target, decode_image
from cnn.serving.export import load_classifier  # builds the network that the key "convoy" describes

with safe_open("model.safetensors", framework="pt") as file:
    about = file.metadata()
{_READ_METADATA}
target = Target(size, expected["shape"][1], expected["resize"])
images = decode_image(Path("photo.jpg").read_bytes(), target)[None].copy()

probabilities = load_classifier(Path("model.safetensors"))(torch.from_numpy(images)).numpy()
{ANSWER}"""


NORMALISED_INSIDE = "keep the pixels as uint8, 0 to 255: the file's network normalises them itself"
NORMALISED_OUTSIDE = "normalise each channel: (pixels / 255 - mean) / std, with the mean and std of the key convoy"


class Usage(Record):
    """The facts that a user of a model file needs."""

    model: str
    """Name of the registered model."""

    version: str
    run: str
    """Id of the MLflow run that trained it."""

    weights_sha256: str
    classes: tuple[str, ...]
    target: Target
    """Size and channels of the images."""

    temperature: float
    """The divisor of the logits that calibrates the probabilities; no file applies it."""

    def metadata(self, example: Callable[[Resize], str], last_step: str = NORMALISED_INSIDE) -> dict[str, str]:
        """Returns the metadata of a file, which have the same keys in all formats.

        `classes`, `input` and `temperature` are JSON, the others are text.

        Args:
            example: returns the code that uses the file, given how rectangles become squares.
            last_step: the last step from a photograph to the network's input.
        """
        images = {
            "name": "images",
            "dtype": "uint8",
            "axes": ["batch", "channel", "height", "width"],
            "shape": [None, *self.target.shape],
            "size": self.target.image_size,
            "mode": self.target.mode,
            "resize": self.target.resize,
            "preparation": [*preparation(self.target), last_step],
        }
        return {
            "model": self.model,
            "version": self.version,
            "run": self.run,
            "weights_sha256": self.weights_sha256,
            "classes": json.dumps(list(self.classes)),
            "input": json.dumps(images),
            "temperature": json.dumps(self.temperature),
            "probabilities": "not calibrated; p ** (1 / temperature), divided by their sum, are",
            "example": example(self.target.resize),
        }


def preparation(target: Target) -> list[str]:
    """Says in words what `cnn.formats.decode.decode_image` does, from an image file to pixels."""
    square = _SQUARES_IN_WORDS[target.resize].format(size=target.image_size)
    return [
        "decode the image (of 16-bit grey, the upper 8 bits)",
        "turn it upright, as its EXIF orientation says",
        "put transparent parts on white",
        f"convert it to {'grey' if target.mode == 'L' else 'colour'} (Pillow's mode {target.mode})",
        f"{square} (bilinear, antialiased)",
    ]
