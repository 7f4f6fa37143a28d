"""The evaluate task: scores the trained weights on the test split, and calibrates their probabilities."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from cnn.config.training import TrainConfig
from cnn.data.manifest import Manifest
from cnn.distributed.process_group import local_device
from cnn.evaluation.calibration import fit_temperature
from cnn.evaluation.evaluate import predict_logits
from cnn.networks.build import build
from cnn.networks.weights import load_weights, weights_sha256
from cnn.networks.wrappers import Normalise, predictor
from infra.errors import ServiceError
from infra.records import Record
from infra.storage import bucket_layout
from infra.storage.object_store import ObjectStore, open_bucket
from tasks.data.dataset import DatasetRef, load_manifest, open_cache, open_split
from tasks.evaluation.publish import publish_evaluation
from tasks.evaluation.reference_images import store_reference
from tasks.evaluation.report import EvaluationReport, evaluation_report, measure_footprint
from tasks.evaluation.split_predictions import store_predictions
from tasks.orchestration.cancellation import stop_if_cancelled
from tasks.orchestration.progress import progress, run_logger
from tasks.orchestration.step import step
from tasks.training.train import TrainResult

REFERENCE_IMAGES = 64  # the serving gate and exports are compared on these


class Evaluation(Record):
    """A finished evaluation."""

    run_id: str
    report: EvaluationReport

    device: str
    """`cpu` or `cuda`: where the network ran."""

    reference_key: str
    """Key of the first test images and their probabilities (tasks/evaluation/reference_images.py)."""

    @property
    def accuracy(self) -> float:
        """Share of the test images that were classified correctly."""
        return self.report.accuracy


@step("evaluate")
def evaluate(config: TrainConfig, dataset: DatasetRef, trained: TrainResult) -> Evaluation:
    """Scores the trained weights on the test split, each image once, and fits a temperature on the validation split.

    Stores the predictions for the quality gate.

    Raises:
        Cancelled: the flow run was cancelled.
        ServiceError: a server failed, or the weights in the bucket are not those of the training.
    """
    stop_if_cancelled()
    store = open_bucket()
    manifest = load_manifest(store, dataset.version)
    cache = open_cache(store)
    validation, test = (open_split(cache, manifest, name) for name in ("val", "test"))
    device = local_device()
    trained_part = trained_network(store, config, manifest, trained).to(memory_format=torch.channels_last)
    network = nn.Sequential(Normalise(manifest.mean, manifest.std), predictor(trained_part, config)).to(device).eval()
    with progress("Evaluating", len(validation) + len(test), unit="images") as advance:
        temperature = fit_temperature(
            predict_logits(network, validation, device, on_progress=advance), validation.labels
        )
        logits = predict_logits(network, test, device, on_progress=advance)
    images, _ = test.slice(0, REFERENCE_IMAGES)
    footprint = measure_footprint(network, images, device)
    report = evaluation_report(
        "test", logits, test.labels, manifest.classes, temperature=temperature, footprint=footprint
    )

    key = bucket_layout.reference_images(trained.run_id)
    store_reference(store, key, images, logits[: len(images)].softmax(1))
    store_predictions(store, trained.run_id, logits.argmax(1), manifest.classes, manifest, trained.weights_sha256)
    run_logger().info(
        "test accuracy %.2f %%, cross-entropy %.4f, %d images", 100 * report.accuracy, report.loss, report.images
    )
    return Evaluation(run_id=trained.run_id, report=report, device=device.type, reference_key=key)


@step("publish-evaluation")
def publish(dataset: DatasetRef, evaluated: Evaluation) -> None:
    """Publishes the report in the MLflow run (`report/`, metrics `test/...`) and as a page in Prefect.

    Raises:
        Cancelled: the flow run was cancelled.
        ServiceError: a server failed.
    """
    stop_if_cancelled()
    store = open_bucket()
    test = open_split(open_cache(store), load_manifest(store, dataset.version), "test")
    publish_evaluation(evaluated.run_id, evaluated.report, test)


def trained_network(store: ObjectStore, config: TrainConfig, manifest: Manifest, trained: TrainResult) -> nn.Module:
    """Returns the network with the verified weights that a training committed, on the CPU, in evaluation mode.

    Raises:
        ServiceError: the weights in the bucket are not those of the training.
    """
    network = build(config, manifest)
    with TemporaryDirectory() as temporary:
        file = Path(temporary) / "weights.safetensors"
        store.get_file(trained.weights_key, file)
        load_weights(network, file)
    found = weights_sha256(network.state_dict())
    if found != trained.weights_sha256:
        raise ServiceError(
            f"{store.uri(trained.weights_key)} does not hold the weights of the training: "
            f"their SHA-256 is {found}, expected {trained.weights_sha256}"
        )
    return network.eval()
