"""Exported files: each gives what the original gives, or does not appear."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.export import ExportedProgram

from cnn.config.preprocessing import Resize
from cnn.config.training import TrainConfig
from cnn.errors import InputError
from cnn.formats.decode import Target, decode_image
from cnn.networks.weights import weights_sha256
from cnn.serving.classifier import ServedClassifier
from cnn.serving.export import (
    ONNX_TOLERANCE,
    Description,
    ExportDiffers,
    export_onnx,
    export_pt2,
    export_weights,
    load_classifier,
)
from cnn.serving.usage import (
    NORMALISED_OUTSIDE,
    SQUARES,
    Usage,
    convoy9_example,
    example_with_convoy,
    onnx_example,
    prepare,
    pt2_example,
)
from tests.cnn.without_convoy import read_metadata, run_example, save_photo

CLASSES = ("ant", "bee", "cat")
IMAGES = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


USAGE = Usage(
    model="pets",
    version="7",
    run="abc",
    weights_sha256="0" * 64,
    classes=CLASSES,
    target=Target(16, 3),
    temperature=0.4,
)


def original() -> tuple[torch.nn.Module, Description, ServedClassifier]:
    torch.manual_seed(0)
    described = Description(
        config=TrainConfig(model="convoy9", network={"width": 4}, test_flip=True),
        classes=CLASSES,
        channels=3,
        image_size=16,
        mean=(0.2, 0.4, 0.6),
        std=(0.1, 0.2, 0.3),
        weights_sha256="",
    )
    network, served = described.classifier()
    return network, described.model_copy(update={"weights_sha256": weights_sha256(network.state_dict())}), served


@pytest.fixture(scope="module")
def program() -> ExportedProgram:
    return torch.export.export(original()[2], (IMAGES[:2],), dynamic_shapes=[{0: torch.export.Dim.AUTO}])


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    return original()[2](IMAGES)


def test_pt2_gives_what_the_original_gives(program: ExportedProgram, expected: torch.Tensor, tmp_path: Path) -> None:
    out = tmp_path / "model.pt2"
    assert export_pt2(program, out, IMAGES, expected) < 1e-6
    assert torch.allclose(torch.export.load(out).module()(IMAGES[:3]), expected[:3], atol=1e-6)
    assert list(tmp_path.iterdir()) == [out]


FULL = """
import resource, sys
from pathlib import Path
import torch
from cnn.serving.export import export_pt2
program = torch.export.export(torch.nn.Linear(64, 64), (torch.zeros(2, 64),))
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # no file can be larger, as on a full disk
try:
    export_pt2(program, Path(sys.argv[1]), torch.zeros(2, 64), torch.zeros(2, 64))
except OSError as error:
    print(error.strerror)
"""


@pytest.mark.long
def test_a_full_disk_is_an_error_and_not_the_end_of_the_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL, str(tmp_path / "model.pt2")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "File too large\n"), done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_onnx_gives_what_the_original_gives(program: ExportedProgram, expected: torch.Tensor, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    out = tmp_path / "named as you like"
    export_onnx(program, out, IMAGES, expected, USAGE.metadata(onnx_example))
    session = runtime.InferenceSession(str(out))
    (found,) = session.run(None, {"images": IMAGES[:3].numpy()})
    assert torch.allclose(torch.from_numpy(found), expected[:3], atol=ONNX_TOLERANCE)
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == list(CLASSES)
    assert list(tmp_path.iterdir()) == [out]


def test_weights_describe_themselves(expected: torch.Tensor, tmp_path: Path) -> None:
    network, described, _ = original()
    out = tmp_path / "model.safetensors"
    assert export_weights(network, described, out, IMAGES, expected) < 1e-6
    assert torch.equal(load_classifier(out)(IMAGES), expected)


EXAMPLES = {"pt2": pt2_example, "onnx": onnx_example, "safetensors": convoy9_example}


def export_to(
    format: str, program: ExportedProgram, expected: torch.Tensor, folder: Path, usage: Usage = USAGE
) -> dict[str, str]:
    """Exports the original; returns the file's metadata."""
    out, metadata = folder / f"model.{format}", usage.metadata(EXAMPLES[format])
    if format == "pt2":
        export_pt2(program, out, IMAGES, expected, metadata)
    elif format == "onnx":
        pytest.importorskip("onnxruntime")
        export_onnx(program, out, IMAGES, expected, metadata)
    else:
        network, described, _ = original()
        export_weights(network, described, out, IMAGES, expected, metadata)
    return read_metadata(out)


@pytest.mark.long
@pytest.mark.parametrize(("format", "resize"), [("pt2", "crop"), ("onnx", "squash"), ("safetensors", "pad")])
def test_the_example_in_a_file_needs_no_convoy(
    program: ExportedProgram, expected: torch.Tensor, tmp_path: Path, format: str, resize: Resize
) -> None:
    usage = USAGE.model_copy(update={"target": Target(16, 3, resize)})
    found = export_to(format, program, expected, tmp_path, usage)
    found.pop("convoy", None)  # the description in a safetensors file
    assert found == usage.metadata(EXAMPLES[format])
    assert json.loads(found["input"])["resize"] == resize
    pixels = decode_image(save_photo(tmp_path), usage.target)[None].copy()
    images, calibrated, answer = run_example(found["example"], tmp_path)
    assert np.array_equal(images, pixels)
    probabilities = original()[2](torch.from_numpy(pixels))
    wanted = (probabilities.log() / USAGE.temperature).softmax(1)[0].numpy()
    assert np.allclose(calibrated, wanted, atol=1e-5)
    name, probability = answer.split()
    assert (name, float(probability)) == (CLASSES[wanted.argmax()], pytest.approx(wanted.max(), abs=1e-5))


@pytest.mark.parametrize("resize", get_args(Resize))
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("size", [(205, 150), (150, 205), (150, 150), (3000, 2001)])
def test_the_code_for_a_photograph_gives_the_pixels_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resize: Resize, orientation: int, size: tuple[int, int]
) -> None:
    file = save_photo(tmp_path, size, orientation)
    monkeypatch.chdir(tmp_path)
    for channels in (1, 3):
        target = Target(45, channels, resize)
        names = {"size": target.image_size, "mode": target.mode, "Image": Image, "ImageOps": ImageOps, "np": np}
        exec(prepare(resize), names)
        assert np.array_equal(names["images"], decode_image(file, target)[None])  # type: ignore[arg-type]


def test_the_example_for_other_networks_uses_convoy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    network, served = (
        described := original()[1].model_copy(update={"config": TrainConfig(model="notes")})
    ).classifier()
    described = described.model_copy(update={"weights_sha256": weights_sha256(network.state_dict())})
    usage = USAGE.model_copy(update={"target": Target(16, 3, "pad")})
    metadata = usage.metadata(example_with_convoy, NORMALISED_OUTSIDE)
    export_weights(network, described, tmp_path / "model.safetensors", IMAGES, served(IMAGES), metadata)
    pixels = decode_image(save_photo(tmp_path), usage.target)[None].copy()
    monkeypatch.chdir(tmp_path)
    exec(read_metadata(tmp_path / "model.safetensors")["example"], {})
    wanted = (served(torch.from_numpy(pixels)).log() / USAGE.temperature).softmax(1)[0]
    name, probability = capsys.readouterr().out.split()
    assert (name, float(probability)) == (CLASSES[wanted.argmax()], pytest.approx(float(wanted.max()), abs=1e-5))


def test_the_page_shows_the_examples_of_the_files() -> None:
    page = Path(__file__).parents[2] / "tasks/prediction/README.md"
    shown = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    whole = [example("crop") for example in EXAMPLES.values()]
    assert sorted(shown) == sorted([*whole, SQUARES["pad"], SQUARES["squash"]])


@pytest.mark.long
def test_axes_of_onnx_have_names(program: ExportedProgram, expected: torch.Tensor, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    found = export_to("onnx", program, expected, tmp_path)
    assert json.loads(found["input"])["axes"] == ["batch", "channel", "height", "width"]
    graph = onnx.load(tmp_path / "model.onnx").graph
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    images, probabilities = (list(value.type.tensor_type.shape.dim) for value in (*graph.input, *graph.output))
    assert [axis.dim_param or axis.dim_value for axis in images] == ["batch", 3, 16, 16]
    assert [axis.dim_param or axis.dim_value for axis in probabilities] == ["batch", 3]
    assert [axis.denotation for axis in images] == ["DATA_BATCH", "DATA_CHANNEL", "DATA_FEATURE", "DATA_FEATURE"]


def test_equal_models_are_equal_files(program: ExportedProgram, expected: torch.Tensor, tmp_path: Path) -> None:
    contents = set()
    for _ in range(5):
        export_to("safetensors", program, expected, tmp_path)
        contents.add((tmp_path / "model.safetensors").read_bytes())
    assert len(contents) == 1


@pytest.mark.long
def test_what_differs_from_the_original_is_not_written(
    program: ExportedProgram, expected: torch.Tensor, tmp_path: Path
) -> None:
    out = tmp_path / "model.pt2"
    out.write_bytes(b"an earlier one")
    network, described, _ = original()
    last = expected.clone()
    last[-1, 0] += 1e-4  # only the large batch shows it
    for wrong in (last, expected[:, :2], expected * torch.nan):
        with pytest.raises(ExportDiffers, match="nothing was written"):
            export_pt2(program, out, IMAGES, wrong)
        with pytest.raises(ExportDiffers, match="nothing was written"):
            export_weights(network, described, out, IMAGES, wrong)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"an earlier one"]


def test_onnx_without_its_packages_is_refused_in_one_line(
    program: ExportedProgram, expected: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cnn.serving.export.ONNX_PACKAGES", ("onnx", "never_to_be_found"))
    with pytest.raises(InputError, match=r"never_to_be_found.*convoy-cnn\[onnx\]"):
        export_onnx(program, tmp_path / "model.onnx", IMAGES, expected)


def test_damaged_or_foreign_weights_are_refused(expected: torch.Tensor, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    network, described, _ = original()
    out = tmp_path / "model.safetensors"
    export_weights(network, described, out, IMAGES, expected)
    content = bytearray(out.read_bytes())
    content[-1] ^= 1
    out.write_bytes(content)
    with pytest.raises(InputError, match="is damaged"):
        load_classifier(out)
    save_file({"weight": torch.zeros(1)}, out)
    with pytest.raises(InputError, match="no description"):
        load_classifier(out)
    out.write_text("text")
    with pytest.raises(InputError, match="cannot be read"):
        load_classifier(out)
