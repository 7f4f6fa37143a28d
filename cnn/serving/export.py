"""Exports a served model to one file: a torch.export program, ONNX, or weights with a description.

A file carries the metadata that its caller gives, such as those of `cnn.serving.usage`. It gets its name only after it
was loaded again and gave the original's probabilities.
"""

import importlib
import json
import os
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.export import ExportedProgram

from cnn.config.preprocessing import Resize
from cnn.config.training import TrainConfig
from cnn.data.manifest import Record
from cnn.errors import InputError
from cnn.networks.build import build_network
from cnn.networks.weights import weights_sha256
from cnn.networks.wrappers import predictor
from cnn.serving.classifier import ServedClassifier

TOLERANCE, ONNX_TOLERANCE = 1e-5, 1e-4
"""Largest allowed difference of a probability; ONNX's is larger since another library computes the convolutions."""

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_DESCRIPTION_KEY = "convoy"  # in a safetensors file's metadata
_NO_METADATA: Mapping[str, str] = MappingProxyType({})
_DENOTATIONS = ("DATA_BATCH", "DATA_CHANNEL", "DATA_FEATURE", "DATA_FEATURE")
"""ONNX's standard meanings of the axes; an axis of a fixed size cannot have a name in the graph as well."""

Predict = Callable[[Tensor], Tensor]
"""Maps raw images uint8 N×C×H×W to probabilities float32 N×classes."""


class ExportDiffers(RuntimeError):
    """An exported model gives other probabilities than the original."""

    exit_status = 1


class Description(Record):
    """The part of an exported file that turns its weights into a classifier."""

    config: TrainConfig
    classes: tuple[str, ...]
    channels: int
    image_size: int
    resize: Resize = "crop"
    """How a photograph becomes a square (`cnn.formats.decode.decode_image`)."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    weights_sha256: str

    def classifier(self) -> tuple[nn.Module, ServedClassifier]:
        """Returns the bare network, whose weights are still to be loaded, and the served classifier around it."""
        network = build_network(
            self.config, channels=self.channels, image_size=self.image_size, classes=len(self.classes)
        )
        return network, ServedClassifier(predictor(network, self.config), self.mean, self.std)


def export_pt2(
    program: ExportedProgram,
    out: Path,
    images: Tensor,
    expected: Tensor,
    metadata: Mapping[str, str] = _NO_METADATA,
) -> float:
    """Writes a program for `torch.export.load`; it takes any number of raw images, and needs PyTorch only.

    Args:
        program: a `ServedClassifier`, exported.
        out: the file; an existing file is replaced.
        images: uint8 N×C×H×W to check with.
        expected: the original's probabilities for `images`, float32 N×classes.
        metadata: texts that the file carries: here as `extra_files` of `torch.export.load`.

    Returns:
        The largest difference of a probability.

    Raises:
        ExportDiffers: the difference is larger than `TOLERANCE`; nothing is written.
    """

    def load(file: Path) -> Predict:
        return torch.export.load(file).module()

    def save(file: Path) -> None:
        memory = BytesIO()
        # Given a path, its writer ends the process if the disk is full.
        torch.export.save(program, memory, extra_files=dict(metadata))
        file.write_bytes(memory.getbuffer())

    return _export(out, ".pt2", save, load, images, expected, TOLERANCE)


def export_onnx(
    program: ExportedProgram,
    out: Path,
    images: Tensor,
    expected: Tensor,
    metadata: Mapping[str, str] = _NO_METADATA,
) -> float:
    """Writes an ONNX model with input `images` and output `probabilities`.

    The first axis of both is called `batch`; all axes of `images` have ONNX's denotations.

    Arguments, result and errors are those of `export_pt2`, with `ONNX_TOLERANCE`.

    Raises:
        InputError: a package that ONNX needs is not installed.
    """
    check_onnx()
    runtime = importlib.import_module("onnxruntime")

    def save(file: Path) -> None:
        made = torch.onnx.export(
            program,
            input_names=["images"],
            output_names=["probabilities"],
            dynamic_shapes={"images": {0: "batch"}},
            dynamo=True,
            verbose=False,
        )
        assert made is not None
        shape = made.model.graph.inputs[0].shape
        assert shape is not None
        for axis, denotation in enumerate(_DENOTATIONS):
            shape.set_denotation(axis, denotation)
        made.model.metadata_props.update(metadata)
        made.save(file)

    def load(file: Path) -> Predict:
        session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run(["probabilities"], {"images": images.numpy()})[0])

    return _export(out, ".onnx", save, load, images, expected, ONNX_TOLERANCE)


def check_onnx() -> None:
    """Raises InputError if a package that ONNX needs is not installed."""
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"ONNX needs packages that are not installed ({', '.join(missing)}): pip install 'convoy-cnn[onnx]'"
        )


def export_weights(
    network: nn.Module,
    description: Description,
    out: Path,
    images: Tensor,
    expected: Tensor,
    metadata: Mapping[str, str] = _NO_METADATA,
) -> float:
    """Writes the weights of a bare network, without normalisation, and a description, for `load_classifier`.

    Arguments, result and errors are those of `export_pt2`.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    header = {**metadata, _DESCRIPTION_KEY: description.model_dump_json()}
    save = lambda file: file.write_bytes(_with_sorted_metadata(to_safetensors(state, header)))  # noqa: E731
    return _export(out, ".safetensors", save, load_classifier, images, expected, TOLERANCE)


def _with_sorted_metadata(content: bytes) -> bytes:
    """Sorts a safetensors file's metadata, which its writer orders at random: equal models then give equal files."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors stay aligned
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def load_classifier(path: Path) -> ServedClassifier:
    """Loads the classifier from a file that `export_weights` has written.

    Raises:
        InputError: the file is no such file, or is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  the file is no mapping
        description = Description.model_validate_json(metadata[_DESCRIPTION_KEY])
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read as a safetensors file: {error}") from None
    except (KeyError, ValidationError):
        raise InputError(f"{path} has weights, but no description by this version of Convoy; export again") from None
    if weights_sha256(state) != description.weights_sha256:
        raise InputError(f"{path} is damaged: its weights differ from its description; export again")
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
    target = os.path.realpath(out)  # a link stays one
    with TemporaryDirectory(dir=os.path.dirname(target), prefix=".export-") as temporary:
        file = Path(temporary, f"model{suffix}")
        save(file)
        worst = _largest_difference(load(file), images, expected)
        if not worst <= tolerance:  # so that NaN fails too
            raise ExportDiffers(
                f"{out}: the exported model differs from the original: a probability by {worst:.2g}, "
                f"more than {tolerance:g}; nothing was written"
            )
        os.replace(file, target)
    return worst


def _largest_difference(predict: Predict, images: Tensor, expected: Tensor) -> float:
    """Returns the largest difference of a probability, in a batch of one image and in a batch of all."""
    differences = []
    with torch.inference_mode():
        for size in (1, len(images)):
            got, wanted = predict(images[:size]), expected[:size]
            differences.append((got - wanted).abs().max() if got.shape == wanted.shape else torch.tensor(torch.inf))
    return float(torch.stack(differences).max())
