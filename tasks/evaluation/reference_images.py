"""Stores the first test images with the evaluated network's probabilities, as one object in the bucket."""

from safetensors.torch import load_file, save
from torch import Tensor

from infra.storage.object_store import ObjectStore


def store_reference(store: ObjectStore, key: str, images: Tensor, probabilities: Tensor) -> None:
    """Stores images, uint8 N×C×H×W, with their probabilities, float32 N×classes."""
    store.put_bytes(key, save({"images": images.contiguous(), "probabilities": probabilities.contiguous()}))


def load_reference(store: ObjectStore, key: str) -> dict[str, Tensor]:
    """Returns the stored `images` and `probabilities`, verified by the digest stored with them."""
    with store.fetched(key) as file:
        return load_file(file)
