"""Export of a registered version on the real stack."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cnn.formats.decode import Target, decode_image
from cnn.serving.export import load_classifier
from infra.errors import ServiceError, UsageError
from infra.tracking.model_registry import set_alias, tag_version
from infra.tracking.model_versions import find_version
from tasks.evaluation.reference_images import load_reference
from tasks.prediction.export import export
from tasks.prediction.predict import ImageClassifier
from tests.cnn.without_convoy import read_metadata, run_example, save_photo
from tests.tasks.registered import Registered, register_digits

NAME = "export-tests"


@pytest.fixture(scope="module")
def registered(stack: object, tmp_path_factory: pytest.TempPathFactory) -> Registered:
    made = register_digits(NAME, tmp_path_factory.mktemp("weights"))
    set_alias(made.version, "champion")
    tag_version(made.version, {"convoy.temperature": "2.5"})
    return made


@pytest.mark.long
@pytest.mark.parametrize("format", ["pt2", "onnx", "safetensors"])
def test_each_format_gives_what_was_evaluated(registered: Registered, tmp_path: Path, format: str) -> None:
    if format == "onnx":
        runtime = pytest.importorskip("onnxruntime")
    out = tmp_path / f"model.{format}"
    done = export(NAME, format, out)  # type: ignore[arg-type]
    assert (done.model, done.bytes, done.images) == (registered.version.uri, out.stat().st_size, 64)
    reference = load_reference(registered.store, registered.evaluated.reference_key)
    images = reference["images"][:7]
    if format == "onnx":
        found = torch.from_numpy(runtime.InferenceSession(str(out)).run(None, {"images": images.numpy()})[0])
    else:
        found = load_classifier(out)(images) if format == "safetensors" else torch.export.load(out).module()(images)
    assert torch.allclose(found, reference["probabilities"][:7], atol=1e-4 if format == "onnx" else 1e-5)
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.long
@pytest.mark.parametrize("format", ["pt2", "onnx", "safetensors"])
def test_a_file_names_its_version_and_its_example_answers_as_predict_does(
    registered: Registered, tmp_path: Path, format: str
) -> None:
    out = tmp_path / f"model.{format}"
    assert export(NAME, format, out).temperature == 2.5  # type: ignore[arg-type]
    found, version = read_metadata(out), find_version(NAME)
    assert (found["model"], found["version"], found["run"]) == (NAME, version.version, version.run_id)
    assert found["weights_sha256"] == version.required("weights_sha256")
    assert json.loads(found["classes"]) == [str(digit) for digit in range(10)]
    assert (json.loads(found["temperature"]), found["probabilities"][:14]) == (2.5, "not calibrated")
    expected = json.loads(found["input"])
    assert (expected["dtype"], expected["shape"], expected["mode"]) == ("uint8", [None, 1, 8, 8], "L")
    pixels = decode_image(save_photo(tmp_path), Target(8, 1))[None]
    images, calibrated, _ = run_example(found["example"], tmp_path)
    assert np.array_equal(images, pixels)
    assert np.allclose(calibrated, ImageClassifier(version).probabilities(pixels)[0], atol=1e-5)


def test_weights_that_are_not_the_version_s_are_not_exported(registered: Registered, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    key = f"runs/{registered.evaluated.run_id}/weights/model.safetensors"
    whole, other = tmp_path / "whole", tmp_path / "other"
    registered.store.get_file(key, whole)
    state = load_file(whole)
    next(iter(state.values())).add_(1)
    save_file(state, other)
    registered.store.put_file(key, other)
    try:
        with pytest.raises(ServiceError, match="does not hold the weights of"):
            export(NAME, "safetensors", tmp_path / "model.safetensors")
        assert not (tmp_path / "model.safetensors").exists()
    finally:
        registered.store.put_file(key, whole)


def test_mistakes_are_refused(registered: Registered, tmp_path: Path) -> None:
    for arguments, hint in (
        ((NAME, "tflite", tmp_path / "x"), "choose one of pt2, onnx, safetensors"),
        ((NAME, "pt2", tmp_path), "cannot write there"),
        ((NAME, "pt2", tmp_path / "x.onnx"), "another format than --format pt2"),
        (("no-such-model", "pt2", tmp_path / "x"), "no model is called"),
        ((f"{NAME}@winner", "pt2", tmp_path / "x"), "has no alias 'winner'"),
    ):
        with pytest.raises(UsageError, match=hint):
            export(*arguments)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
