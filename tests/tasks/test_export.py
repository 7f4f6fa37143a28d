"""Export of a registered version on the real stack."""

from pathlib import Path

import pytest
import torch

from cnn.serving.export import load_classifier
from infra.errors import ServiceError, UsageError
from infra.tracking.model_registry import set_alias
from tasks.evaluation.reference_images import load_reference
from tasks.prediction.export import export
from tests.tasks.registered import Registered, register_digits

NAME = "export-tests"


@pytest.fixture(scope="module")
def registered(stack: object, tmp_path_factory: pytest.TempPathFactory) -> Registered:
    made = register_digits(NAME, tmp_path_factory.mktemp("weights"))
    set_alias(made.version, "champion")
    return made


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
        (("no-such-model", "pt2", tmp_path / "x"), "no model is called"),
        ((f"{NAME}@winner", "pt2", tmp_path / "x"), "has no alias 'winner'"),
    ):
        with pytest.raises(UsageError, match=hint):
            export(*arguments)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
