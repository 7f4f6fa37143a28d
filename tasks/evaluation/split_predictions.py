"""Stores a run's predictions for a test split in the bucket, so that no gate has to predict them again.

The object is runs/<run>/test-predictions.safetensors. It is valid for the same test split and the same weights only.
"""

import json
from collections.abc import Sequence

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from cnn.data.manifest import Manifest
from infra.storage import bucket_layout
from infra.storage.object_store import ObjectStore
from infra.storage.s3_client import ObjectMissing


def store_predictions(
    store: ObjectStore, run_id: str, predicted: Tensor, classes: Sequence[str], manifest: Manifest, weights_sha256: str
) -> None:
    """Stores a run's predictions for the test split; they replace those for another split.

    Args:
        predicted: int64 [N], positions in `classes`.
        classes: class names, in the order of the network's outputs.
        manifest: of the test split's dataset version.
    """
    marks = {"of": _mark(manifest, weights_sha256), "classes": json.dumps(list(classes))}
    stored = save({"predicted": predicted.to(torch.int64).contiguous()}, metadata=marks)
    store.put_bytes(bucket_layout.test_predictions(run_id), stored)


def load_predictions(
    store: ObjectStore, run_id: str, manifest: Manifest, weights_sha256: str
) -> tuple[Tensor, tuple[str, ...]] | None:
    """Returns predictions, int64 [N], and the class names they index; None if none are stored for this split."""
    try:
        with (
            store.fetched(bucket_layout.test_predictions(run_id)) as file,
            safe_open(file, framework="pt") as opened,
        ):
            marks = opened.metadata()
            if marks["of"] != _mark(manifest, weights_sha256):
                return None
            return opened.get_tensor("predicted"), tuple(json.loads(marks["classes"]))
    except ObjectMissing:
        return None


def _mark(manifest: Manifest, weights_sha256: str) -> str:
    """Returns what predictions depend on: the weights, and the images in their order."""
    return " ".join([weights_sha256, *(shard.sha256 for shard in manifest.splits["test"].shards)])
