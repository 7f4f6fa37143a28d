"""Evaluation, registration and verification on the real stack, from weights in the bucket to an alias."""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow.artifacts import download_artifacts
from mlflow.tracking import MlflowClient
from prefect import flow
from prefect.artifacts import Artifact
from prefect.context import refresh_global_settings_context

from cnn.config.preprocessing import PreprocessConfig
from cnn.config.training import TrainConfig
from cnn.networks.build import build_network
from cnn.networks.weights import save_weights
from infra.errors import ServiceError, UsageError
from infra.settings import Settings
from infra.storage.object_store import ObjectStore
from infra.tracking import mlflow_runs
from infra.tracking.model_registry import ModelVersion
from tasks.data.dataset import DatasetRef, load_manifest
from tasks.data.download import download
from tasks.data.preprocess import preprocess
from tasks.evaluation.evaluate import Evaluation, evaluate, publish
from tasks.release.register import register
from tasks.training.train import TrainResult

CONFIG = TrainConfig(model="convoy9", network={"width": 8})


@dataclass(frozen=True)
class Trained:
    """What the train task leaves: digits, a run, and weights in the bucket."""

    store: ObjectStore
    dataset: DatasetRef
    result: TrainResult


@pytest.fixture(scope="module")
def trained(stack: object, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    refresh_global_settings_context()  # Prefect was imported before the stack named its server

    @flow
    def prepare() -> DatasetRef:
        return preprocess(download("digits"), PreprocessConfig(limit=300))

    dataset = prepare()
    store = ObjectStore.connect(Settings().bucket)
    manifest = load_manifest(store, dataset.version)
    torch.manual_seed(0)
    network = build_network(
        CONFIG, channels=manifest.channels, image_size=manifest.image_size, classes=len(manifest.classes)
    )
    run_id = mlflow_runs.start_run("register-tests", "run", {"model": CONFIG.model}, {})
    weights = tmp_path_factory.mktemp("weights") / "model.safetensors"
    digest = save_weights(network.state_dict(), weights)
    key = f"runs/{run_id}/weights/model.safetensors"
    store.put_file(key, weights)
    result = TrainResult(
        run_id=run_id,
        weights_key=key,
        weights_sha256=digest,
        world_size=1,
        steps=1,
        train_seconds=1.0,
        images_per_second=1.0,
        val_accuracy=0.1,
        val_loss=2.3,
    )
    return Trained(store, dataset, result)


@pytest.fixture(scope="module")
def evaluated(trained: Trained) -> Evaluation:
    @flow
    def evaluating() -> Evaluation:
        found = evaluate(CONFIG, trained.dataset, trained.result)
        publish(CONFIG, trained.dataset, found)
        return found

    return evaluating()


@pytest.fixture(scope="module")
def registered(trained: Trained, evaluated: Evaluation) -> ModelVersion:
    @flow
    def registering() -> ModelVersion:
        return register("digits-test", CONFIG, trained.dataset, trained.result, evaluated)

    return registering()


@pytest.mark.long
def test_evaluation_is_in_the_run(trained: Trained, evaluated: Evaluation) -> None:
    run = MlflowClient().get_run(trained.result.run_id)
    assert run.data.metrics["test/accuracy"] == evaluated.accuracy
    assert set(run.data.metrics) >= {"test/loss", "test/macro_f1"}
    folder = Path(download_artifacts(run_id=trained.result.run_id, artifact_path="report"))
    report = json.loads((folder / "evaluation.json").read_text())
    counts = json.loads((folder / "confusion_matrix.json").read_text())["counts"]
    assert report["accuracy"] == evaluated.accuracy
    assert sum(map(sum, counts)) == report["images"] == evaluated.report.images
    assert (folder / "confusion_matrix.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "augmented.png").read_bytes().startswith(b"\x89PNG")
    assert not (folder / "grad_cam.png").exists()  # 8×8 pixels leave no useful map
    page = Artifact.get("evaluation")
    assert f"{evaluated.report.images:,} test images" in str(page.data)  # type: ignore[union-attr]


def test_weights_that_are_not_those_of_the_training_are_not_evaluated(trained: Trained) -> None:
    other = trained.result.model_copy(update={"weights_sha256": "0" * 64})
    with pytest.raises(ServiceError, match="does not hold the weights of the training"):
        evaluate.fn(CONFIG, trained.dataset, other)


def test_registered_version_carries_its_origin(trained: Trained, registered: ModelVersion) -> None:
    version = MlflowClient().get_model_version(registered.name, registered.version)
    assert version.run_id == trained.result.run_id
    assert version.tags["convoy.dataset_version"] == trained.dataset.version
    assert version.tags["convoy.weights_sha256"] == trained.result.weights_sha256
    assert version.tags["prefect.flow_run_id"]
    (output,) = MlflowClient().get_run(trained.result.run_id).outputs.model_outputs  # type: ignore[union-attr]
    assert f"models:/{output.model_id}" == version.source


def test_registered_model_describes_itself(trained: Trained, registered: ModelVersion) -> None:
    info = mlflow.models.get_model_info(registered.uri)
    assert str(info.signature.inputs) == "[Tensor('uint8', (-1, 1, 8, 8))]"
    assert str(info.signature.outputs) == "[Tensor('float32', (-1, 10))]"
    manifest = load_manifest(trained.store, trained.dataset.version)
    assert info.metadata is not None
    assert info.metadata["classes"] == list(manifest.classes)
    assert info.metadata["resize"] == "crop"
    assert info.saved_input_example_info is not None
    assert info.flavors["python_function"]["config"]["device"] == "cpu"


def test_registered_files_hold_no_pickled_weights(registered: ModelVersion) -> None:
    folder = Path(download_artifacts(registered.uri))
    names = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".pth", ".pt", ".bin"))]
    with zipfile.ZipFile(folder / "data" / "model.pt2") as archive:
        configs = [
            name for name in archive.namelist() if name.endswith(("weights_config.json", "constants_config.json"))
        ]
        assert len(configs) == 2
        for name in configs:
            assert not [
                tensor for tensor, payload in json.loads(archive.read(name))["config"].items() if payload["use_pickle"]
            ]


@pytest.mark.parametrize("name", ["", "a/b", "models:1"])
def test_name_that_mlflow_refuses_registers_nothing(trained: Trained, evaluated: Evaluation, name: str) -> None:
    with pytest.raises(UsageError, match="cannot name a model"):
        register.fn(name, CONFIG, trained.dataset, trained.result, evaluated)


def test_failed_export_registers_nothing(
    trained: Trained, evaluated: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cnn.serving.classifier.ServedClassifier.forward", _cannot_be_exported)
    with pytest.raises(Exception, match=r"data-dependent|Could not guard|Could not extract"):
        register.fn("never-registered", CONFIG, trained.dataset, trained.result, evaluated)
    assert not MlflowClient().search_registered_models("name = 'never-registered'")


def _cannot_be_exported(self: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The number of values in the output depends on the images' content."""
    return images.float().flatten(1) if images.sum().item() > 10 else images.float()
