"""The model card of a version that the real tasks have made."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient
from prefect import flow

from cnn.data.manifest import Manifest
from cnn.formats.decode import Target, decode_image
from cnn.serving.usage import SQUARES
from infra.tracking.client import tracking_uri
from infra.tracking.model_registry import ModelVersion
from infra.tracking.model_versions import find_version
from infra.tracking.provenance import Provenance
from tasks.config.run import RunConfig
from tasks.data.dataset import load_manifest
from tasks.evaluation.report import evaluation_report
from tasks.prediction.predict import ImageClassifier
from tasks.release.model_card import CardLinks, model_card, write_model_card
from tasks.training.runs.run_record import read_record
from tasks.training.train import TrainResult
from tests.cnn.without_convoy import run_example, save_photo
from tests.tasks.registered import Registered, register_digits

SECTIONS = ("Intended use", "How to load", "Limits", "Origin", "Data", "Configuration")
ORIGIN = CardLinks(
    tracking_uri="http://mlflow",
    run_url="http://mlflow/#/experiments/1/runs/abc",
    flow_run_url=None,
    dataset_uri="s3://convoy/datasets/d/manifest.json",
    weights_uri="s3://convoy/runs/abc/weights/model.safetensors",
    code=Provenance(git_commit=None, git_dirty=None, lock_sha256=None, versions={"torch": "2"}),
)


@pytest.fixture(scope="module")
def made(stack: object, tmp_path_factory: pytest.TempPathFactory) -> Registered:
    return register_digits("carded", tmp_path_factory.mktemp("weights"))


def trained(made: Registered) -> TrainResult:
    tags = MlflowClient().get_model_version(made.version.name, made.version.version).tags
    return TrainResult(
        run_id=made.evaluated.run_id,
        weights_key=tags["convoy.weights_key"],
        weights_sha256=tags["convoy.weights_sha256"],
        world_size=1,
        steps=1,
        train_seconds=1.0,
        images_per_second=1.0,
        val_accuracy=0.5,
        val_loss=2.3,
    )


@pytest.mark.long
def test_card_is_the_description_and_links_to_everything(made: Registered) -> None:
    config, result = read_record(made.evaluated.run_id).config, trained(made)

    @flow
    def run() -> None:
        write_model_card(made.version, config, made.dataset, result, made.evaluated)

    run()
    version = MlflowClient().get_model_version(made.version.name, made.version.version)
    card = version.description
    assert card.startswith(f"{made.evaluated.accuracy:.2%} of {made.evaluated.report.images:,} test images right")
    assert f"# carded, version {made.version.version}" in card
    assert f'mlflow.pyfunc.load_model("{made.version.uri}")' in card
    assert f'mlflow.set_tracking_uri("{tracking_uri()}")' in card
    assert "numpy uint8 [N, 1, 8, 8]" in card
    for part in (
        made.evaluated.run_id,
        f"s3://{made.store.bucket}/datasets/{made.dataset.version}/manifest.json",
        result.weights_sha256,
        f"flow-run/{version.tags['prefect.flow_run_id']}",
    ):
        assert part in card
    assert "This was a trial run on at most 300 images per split." in card
    assert "`network.width` 8" in card
    assert "`batch_size` 64" in card
    assert "`momentum`" not in card  # a default
    headings = [line for line in card.splitlines() if line.startswith("## ")]
    assert headings == [f"## {name}" for name in SECTIONS]


@pytest.mark.long
def test_code_of_the_card_needs_no_convoy(made: Registered, tmp_path: Path) -> None:
    manifest = load_manifest(made.store, made.dataset.version)

    def card_of(manifest: Manifest) -> str:
        return model_card(
            made.version,
            RunConfig(dataset="digits", batch_size=64),
            made.dataset,
            manifest,
            trained(made),
            made.evaluated.report,
            ORIGIN.model_copy(update={"tracking_uri": tracking_uri()}),
        )

    card = card_of(manifest)
    padded = card_of(manifest.model_copy(update={"resize": "pad"}))
    assert SQUARES["pad"] in padded and "in the middle of a square of its mean colour" in padded
    code = card.partition("```python\n")[2].partition("```")[0]
    pixels = decode_image(save_photo(tmp_path), Target(8, 1))[None]
    images, calibrated, answer = run_example(code, tmp_path)
    assert np.array_equal(images, pixels)
    expected = ImageClassifier(find_version(made.version.address)).probabilities(pixels)[0]
    assert np.allclose(calibrated, expected, atol=1e-5)
    assert answer.split()[0] == manifest.classes[expected.argmax()]
    assert f"p ** (1 / {made.evaluated.report.calibration.temperature})" in card


def test_card_names_weak_classes_and_the_commonest_mistake(made: Registered) -> None:
    classes = ("cat|`dog`", "<b>bird", "fish")
    labels = torch.tensor([0] * 4 + [1] * 4 + [2] * 4)
    logits = torch.eye(3)[torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2])]
    manifest = load_manifest(made.store, made.dataset.version).model_copy(update={"classes": classes})
    card = model_card(
        ModelVersion(name="pets", version="1"),
        RunConfig(dataset="digits", batch_size=64),
        made.dataset,
        manifest,
        trained(made),
        evaluation_report("test", logits, labels, classes),
        ORIGIN,
    )
    assert "Classes with the lowest recall: \\<b>bird 50.0%, cat\\|\\`dog\\` 75.0%, fish 100.0%." in card
    assert "Most frequent mistake: \\<b>bird classified as fish, 2 times." in card
    assert "Classes with fewer than 100 test images, whose scores are uncertain: 3." in card
    assert "git commit unknown" in card


def test_card_of_many_classes_fits_mlflow(made: Registered) -> None:
    classes = tuple(f"class with a long name number {number}" for number in range(1000))
    labels = torch.arange(1000)
    manifest = load_manifest(made.store, made.dataset.version).model_copy(update={"classes": classes})
    report = evaluation_report("test", torch.eye(1000), labels, classes)
    card = model_card(
        made.version, RunConfig(dataset="digits", batch_size=64), made.dataset, manifest, trained(made), report, ORIGIN
    )
    assert "and 970 more" in card
    assert len(card) < 5000
