"""Makes a registered version of a small network for digits, by the real tasks, from untrained weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from prefect import flow
from prefect.context import refresh_global_settings_context

from cnn.networks.build import build
from cnn.networks.weights import save_weights
from infra.settings import Settings
from infra.storage.object_store import ObjectStore
from infra.tracking.model_registry import ModelVersion
from tasks.config.run import RunConfig
from tasks.data.dataset import DatasetRef, load_manifest
from tasks.data.download import download
from tasks.data.preprocess import preprocess
from tasks.evaluation.evaluate import Evaluation, evaluate, publish
from tasks.release.register import register
from tasks.training.runs.tracked_run import tracked_run
from tasks.training.train import TrainResult


@dataclass(frozen=True)
class Registered:
    """A registered version with its store, data set and evaluation."""

    store: ObjectStore
    dataset: DatasetRef
    evaluated: Evaluation
    version: ModelVersion


def register_digits(
    name: str, folder: Path, data: Mapping[str, object] | None = None, dataset: str = "digits"
) -> Registered:
    """Registers a version of `name`; needs the stack.

    Args:
        folder: for temporary files.
        data: configuration of preprocessing.
        dataset: another data set of images of digits.
    """
    refresh_global_settings_context()  # Prefect was imported before the stack named its server
    config = RunConfig.model_validate(
        {
            "dataset": dataset,
            "name": name,
            "network": {"width": 8},
            "data": {"limit": 300, **(data or {})},
            "batch_size": 64,
        }
    )

    @flow
    def make() -> Registered:
        packed = preprocess(download(dataset, config.data), config.data)
        store = ObjectStore.connect(Settings().bucket)
        torch.manual_seed(0)
        network = build(config.training(), load_manifest(store, packed.version))
        weights = folder / "model.safetensors"
        digest = save_weights(network.state_dict(), weights)
        with tracked_run(config, packed) as run:
            key = f"runs/{run.run_id}/weights/model.safetensors"
            store.put_file(key, weights)
            result = TrainResult(
                run_id=run.run_id,
                weights_key=key,
                weights_sha256=digest,
                world_size=1,
                steps=1,
                train_seconds=1.0,
                images_per_second=1.0,
                val_accuracy=0.1,
                val_loss=2.3,
            )
            evaluated = evaluate(config.training(), packed, result)
            publish(config.training(), packed, evaluated)
            version = register(name, config.training(), packed, result, evaluated)
        return Registered(store, packed, evaluated, version)

    return make()
