"""The register task: stores the served model in MLflow, and registers it as a new version."""

from importlib.metadata import version

import torch

from cnn.config.training import TrainConfig
from cnn.networks.wrappers import normalisation, predictor
from cnn.serving.classifier import ServedClassifier
from infra.storage.object_store import open_bucket
from infra.tracking.model_registry import ModelVersion, check_model_name, create_version, log_model, version_of
from infra.tracking.provenance import provenance
from infra.tracking.tags import VersionRecord
from tasks.data.dataset import DatasetRef, load_manifest
from tasks.evaluation.evaluate import Evaluation, trained_network
from tasks.evaluation.reference_images import load_reference
from tasks.orchestration.cancellation import stop_if_cancelled
from tasks.orchestration.flow_runs import flow_run_id
from tasks.orchestration.progress import run_logger
from tasks.orchestration.step import step
from tasks.training.train import TrainResult

REQUIREMENTS = ("torch", "numpy")  # packages that the model needs besides MLflow


@step("register")
def register(
    name: str, config: TrainConfig, dataset: DatasetRef, trained: TrainResult, evaluated: Evaluation
) -> ModelVersion:
    """Stores the served model with its run, and creates the next version of `name`, without an alias.

    The version is created last, so that an earlier failure leaves the registry unchanged.

    Raises:
        Cancelled: the flow run was cancelled.
        UsageError: invalid name.
        ServiceError: a server failed.
    """
    stop_if_cancelled()
    check_model_name(name)
    if found := version_of(name, trained.run_id):
        run_logger().info("version %s of model %s is already registered", found.version, found.name)
        return found
    store = open_bucket()
    manifest = load_manifest(store, dataset.version)
    network = predictor(trained_network(store, config, manifest, trained), config)
    served = ServedClassifier(network, *normalisation(config, manifest))
    example = load_reference(store, evaluated.reference_key)["images"][:2]
    example = example.expand(2, -1, -1, -1).contiguous() if len(example) == 1 else example
    with torch.inference_mode():
        outputs = served(example)
    model_id = log_model(
        trained.run_id,
        served,
        images=example.numpy(),
        outputs=outputs.numpy(),
        requirements=[f"{package}=={version(package)}" for package in REQUIREMENTS],
        metadata={
            "classes": list(manifest.classes),
            "dataset_version": dataset.version,
            "resize": manifest.resize,
            "weights_sha256": trained.weights_sha256,
        },
    )
    record = version_record(dataset, trained, evaluated).model_copy(update={"serving": "pending"})
    registered = create_version(name, model_id, run_id=trained.run_id, tags=record.to_tags())
    run_logger().info("registered version %s of model %s", registered.version, registered.name)
    return registered


def version_record(dataset: DatasetRef, trained: TrainResult, evaluated: Evaluation) -> VersionRecord:
    """Returns what a version's tags say of its training, before any gate."""
    flow = flow_run_id()
    record = VersionRecord(
        test_accuracy=str(evaluated.accuracy),
        dataset=dataset.name,
        dataset_version=dataset.version,
        weights_sha256=trained.weights_sha256,
        weights_key=trained.weights_key,
        reference_key=evaluated.reference_key,
        temperature=str(evaluated.report.calibration.temperature),
        git_commit=provenance().git_commit,
        flow_run=str(flow) if flow else None,
    )
    return record.model_copy(update={"result": record.headline})
