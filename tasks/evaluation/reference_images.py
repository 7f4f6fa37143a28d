"""The first test images and what the evaluated network said of them: an object in the bucket."""

from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import load_file, save_file
from torch import Tensor

from infra.storage.object_store import ObjectStore


def store_reference(store: ObjectStore, key: str, images: Tensor, probabilities: Tensor) -> None:
    """Write uint8 N×C×H×W and float32 N×classes."""
    with TemporaryDirectory() as temporary:
        file = Path(temporary) / "reference.safetensors"
        save_file({"images": images.contiguous(), "probabilities": probabilities.contiguous()}, file)
        store.put_file(key, file)


def load_reference(store: ObjectStore, key: str) -> dict[str, Tensor]:
    """Read `images` and `probabilities` back, verified by the digest that was stored with them."""
    info = store.head(key)
    with TemporaryDirectory() as temporary:
        file = Path(temporary) / "reference.safetensors"
        store.get_file(key, file, sha256=info.sha256 if info else None)
        return load_file(file)
