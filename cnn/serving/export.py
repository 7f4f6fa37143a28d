"""A served model as one file for use elsewhere: a torch.export program, ONNX, or weights that describe themselves.

Each is loaded again, from the file, and must give what the original gives before the file appears at its name.
"""

import importlib
import json
import os
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import ExportedProgram

from cnn.config.training import TrainConfig
from cnn.data.manifest import Record
from cnn.errors import InputError
from cnn.networks.build import build_network
from cnn.networks.weights import weights_sha256
from cnn.networks.wrappers import predictor
from cnn.serving.classifier import ServedClassifier

TOLERANCE, ONNX_TOLERANCE = 1e-5, 1e-4
"""Largest difference of a probability: round-off, and that of another library's convolutions."""

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_KEY = "convoy"  # of the description among a safetensors file's metadata

Predict = Callable[[Tensor], Tensor]
"""Raw images uint8 N×C×H×W to probabilities float32 N×classes."""


class ExportDiffers(RuntimeError):
    """An exported model says something else than the original."""

    exit_status = 1


class Description(Record):
    """What turns a file of weights into a classifier."""

    config: TrainConfig
    classes: tuple[str, ...]
    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    weights_sha256: str

    def classifier(self) -> tuple[nn.Module, ServedClassifier]:
        """The bare network, with weights that are still to be loaded, and the served one around it."""
        network = build_network(
            self.config, channels=self.channels, image_size=self.image_size, classes=len(self.classes)
        )
        return network, ServedClassifier(predictor(network, self.config), self.mean, self.std)


def export_pt2(program: ExportedProgram, out: Path, images: Tensor, expected: Tensor) -> float:
    """Write a program for `torch.export.load`; it takes raw images, any number of them, and needs PyTorch only.

    Args:
        program: of a `ServedClassifier`.
        out: the file; one that is there is replaced.
        images: uint8 N×C×H×W to check with.
        expected: the original's probabilities of them, float32 N×classes.

    Returns:
        The largest difference of a probability.

    Raises:
        ExportDiffers: it differs by more than `TOLERANCE`; nothing is written.
    """

    def load(file: Path) -> Predict:
        return torch.export.load(file).module()

    def save(file: Path) -> None:
        memory = BytesIO()
        torch.export.save(program, memory)  # given a file, its writer ends the process on a full disk
        file.write_bytes(memory.getbuffer())

    return _export(out, ".pt2", save, load, images, expected, TOLERANCE)


def export_onnx(program: ExportedProgram, classes: Sequence[str], out: Path, images: Tensor, expected: Tensor) -> float:
    """Write an ONNX model, with input `images` and output `probabilities`; `classes` is JSON among its metadata.

    Arguments, result and errors are those of `export_pt2`, with `ONNX_TOLERANCE`.

    Raises:
        InputError: the packages that it takes are not installed.
    """
    check_onnx()
    runtime = importlib.import_module("onnxruntime")

    def save(file: Path) -> None:
        made = torch.onnx.export(
            program, input_names=["images"], output_names=["probabilities"], dynamo=True, verbose=False
        )
        assert made is not None
        made.model.metadata_props["classes"] = json.dumps(list(classes))
        made.save(file)

    def load(file: Path) -> Predict:
        session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run(["probabilities"], {"images": images.numpy()})[0])

    return _export(out, ".onnx", save, load, images, expected, ONNX_TOLERANCE)


def check_onnx() -> None:
    """Raise InputError if a package is missing that ONNX takes."""
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"ONNX takes packages that are not installed ({', '.join(missing)}): pip install 'convoy-cnn[onnx]'"
        )


def export_weights(network: nn.Module, description: Description, out: Path, images: Tensor, expected: Tensor) -> float:
    """Write a network's weights with all that is needed to use them, for `load_classifier`.

    Arguments, result and errors are those of `export_pt2`.

    Args:
        network: the bare one, without normalisation.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    metadata = {_KEY: description.model_dump_json()}
    save = lambda file: save_file(state, file, metadata)  # noqa: E731
    return _export(out, ".safetensors", save, load_classifier, images, expected, TOLERANCE)


def load_classifier(path: Path) -> ServedClassifier:
    """The classifier in a file that `export_weights` has written.

    Raises:
        InputError: it is no such file, or is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
        description = Description.model_validate_json(metadata[_KEY])
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read as a safetensors file: {error}") from None
    except (KeyError, ValidationError):
        raise InputError(f"{path} holds weights, but no description by this version of Convoy") from None
    if weights_sha256(state) != description.weights_sha256:
        raise InputError(f"{path} is damaged: its weights are not those that it describes")
    network, served = description.classifier()
    network.load_state_dict(state)
    return served


def _export(
    out: Path,
    suffix: str,
    save: Callable[[Path], object],
    load: Callable[[Path], Predict],
    images: Tensor,
    expected: Tensor,
    tolerance: float,
) -> float:
    with TemporaryDirectory(dir=out.absolute().parent, prefix=".export-") as temporary:
        file = Path(temporary, f"model{suffix}")
        save(file)
        worst = _largest_difference(load(file), images, expected)
        if not worst <= tolerance:  # so that NaN fails too
            raise ExportDiffers(
                f"{out}: the exported model is not the original: a probability differs by {worst:.2g}, "
                f"more than {tolerance:g}; nothing was written"
            )
        os.replace(file, out)
    return worst


def _largest_difference(predict: Predict, images: Tensor, expected: Tensor) -> float:
    """Over a batch of one and a batch of all."""
    differences = []
    with torch.inference_mode():
        for size in (1, len(images)):
            got, wanted = predict(images[:size]), expected[:size]
            differences.append((got - wanted).abs().max() if got.shape == wanted.shape else torch.tensor(torch.inf))
    return float(torch.stack(differences).max())
