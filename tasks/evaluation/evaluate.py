"""The evaluate task: scores the trained weights on the test split, and calibrates their probabilities."""

from collections.abc import Sequence

import torch
from torch import nn

from cnn.config.training import TrainConfig
from cnn.data.manifest import Manifest
from cnn.distributed.process_group import local_device
from cnn.evaluation.calibration import fit_temperature
from cnn.evaluation.evaluate import predict_logits
from cnn.networks.build import build
from cnn.networks.weights import load_weights, weights_sha256
from cnn.networks.wrappers import Normalise, normalisation, predictor
from infra.errors import ServiceError
from infra.records import Record
from infra.storage import bucket_layout
from infra.storage.object_store import ObjectStore, open_bucket
from infra.tracking import mlflow_runs
from tasks.data.dataset import DatasetRef, load_manifest, open_cache, open_split, stream_split
from tasks.data.image_index import load_index
from tasks.evaluation.heat_maps import HeatMap, heat_maps
from tasks.evaluation.reference_images import store_reference
from tasks.evaluation.report import EvaluationReport, evaluation_report, measure_footprint
from tasks.evaluation.split_predictions import store_predictions
from tasks.orchestration.cancellation import stop_if_cancelled
from tasks.orchestration.progress import progress, run_logger
from tasks.orchestration.step import step
from tasks.training.augmented_sheet import augmented_sheet
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

    heat_maps: tuple[HeatMap, ...] = ()
    """Of some wrong and some right images; none if the network has no useful map."""

    @property
    def accuracy(self) -> float:
        """Share of the test images that were classified correctly."""
        return self.report.accuracy


@step("evaluate")
def evaluate(
    config: TrainConfig, dataset: DatasetRef, trained: TrainResult, *, slices: Sequence[str] = ()
) -> Evaluation:
    """Scores the trained weights on the test split, each image once, and fits a temperature on the validation split.

    Stores the predictions for the quality gate.

    Args:
        slices: columns of metadata whose values get an accuracy each.

    Raises:
        Cancelled: the flow run was cancelled.
        ServiceError: a server failed, or the weights in the bucket are not those of the training.
    """
    stop_if_cancelled()
    store = open_bucket()
    manifest, index = load_manifest(store, dataset.version), load_index(store, dataset.version)
    cache = open_cache(store)
    validation, test = (open_split(cache, manifest, name) for name in ("val", "test"))
    device = local_device()
    trained_part = trained_network(store, config, manifest, trained).to(memory_format=torch.channels_last)
    network = nn.Sequential(Normalise(*normalisation(config, manifest)), predictor(trained_part, config))
    network = network.to(device).eval()
    with progress("Evaluating", len(validation) + len(test), unit="images") as advance:
        temperature = fit_temperature(
            predict_logits(network, validation, device, on_progress=advance), validation.labels
        )
        logits = predict_logits(network, test, device, on_progress=advance)
    images, _ = test.slice(0, REFERENCE_IMAGES)
    footprint = measure_footprint(network, images, device)
    report = evaluation_report(
        "test",
        logits,
        test.labels,
        manifest.classes,
        temperature=temperature,
        slices=index.slices("test", slices) if index else None,
        footprint=footprint,
    )
    if index:
        report = report.with_paths(index.paths("test"))

    key = bucket_layout.reference_images(trained.run_id)
    store_reference(store, key, images, logits[: len(images)].softmax(1))
    store_predictions(store, trained.run_id, logits.argmax(1), manifest.classes, manifest, trained.weights_sha256)
    run_logger().info(
        "test accuracy %.2f %%, cross-entropy %.4f, %d images", 100 * report.accuracy, report.loss, report.images
    )
    return Evaluation(
        run_id=trained.run_id,
        report=report,
        device=device.type,
        reference_key=key,
        heat_maps=heat_maps(report, logits, test, network[0], trained_part),
    )


@step("publish-evaluation")
def publish(config: TrainConfig, dataset: DatasetRef, evaluated: Evaluation) -> None:
    """Publishes the report in the MLflow run (`report/`, metrics `test/...`) and as a page in Prefect.

    The run also gets a picture of augmented training images, drawn here since this task runs beside others.

    Raises:
        Cancelled: the flow run was cancelled.
        ServiceError: a server failed.
    """
    from tasks.evaluation.publish import publish_evaluation  # loads matplotlib

    stop_if_cancelled()
    store = open_bucket()
    manifest, cache = load_manifest(store, dataset.version), open_cache(store)
    publish_evaluation(evaluated.run_id, evaluated.report, open_split(cache, manifest, "test"), evaluated.heat_maps)
    if not config.augment.is_off:
        train = stream_split(cache, manifest, "train")  # the ranks may have trained elsewhere, and few images are drawn
        sheet = augmented_sheet(config, manifest, train, local_device())
        mlflow_runs.log_image(evaluated.run_id, "report/augmented.png", sheet)


def trained_network(store: ObjectStore, config: TrainConfig, manifest: Manifest, trained: TrainResult) -> nn.Module:
    """Returns the network with the verified weights that a training committed, on the CPU, in evaluation mode.

    Raises:
        ServiceError: the weights in the bucket are not those of the training.
    """
    network = build(config, manifest)
    fetch_weights(store, trained.weights_key, trained.weights_sha256, network)
    return network.eval()


def fetch_weights(store: ObjectStore, key: str, sha256: str, network: nn.Module) -> None:
    """Loads the weights that a training committed into its network.

    Raises:
        ServiceError: the object has other weights.
    """
    with store.fetched(key) as file:
        load_weights(network, file)
    if (found := weights_sha256(network.state_dict())) != sha256:
        raise ServiceError(
            f"{store.uri(key)} does not hold the weights of the training: their SHA-256 is {found}, expected {sha256}"
        )
