"""Dataset versions in the bucket: where they are, whether they are whole, and opening them for reading."""

import hashlib
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict

from cnn.errors import InputError
from cnn.manifest import Manifest, Shard
from cnn.packed import PackedSplit
from cnn.split import Split
from infra.cache import Cache
from infra.errors import ServiceError
from infra.meter import in_parallel
from infra.objectstore import ObjectMissing, ObjectStore

T = TypeVar("T")


class DatasetDamaged(ServiceError):
    """A dataset version in the bucket is not what its digest says."""


class DatasetRef(BaseModel):
    """A dataset version in the bucket."""

    model_config = ConfigDict(frozen=True)

    version: str
    """SHA-256 of its manifest."""

    name: str
    reused: bool = False
    """It was there already."""


def manifest_key(version: str) -> str:
    """Key of a dataset version's manifest, the object that commits it."""
    return f"datasets/{version}/manifest.json"


def shard_key(shard: Shard) -> str:
    """Key of a shard."""
    return f"shards/{shard.sha256}.safetensors"


def pretrained_key(sha256: str) -> str:
    """Key of weights to start a training from."""
    return f"pretrained/{sha256}.safetensors"


def load_manifest(store: ObjectStore, version: str) -> Manifest:
    """Read and verify a manifest.

    Raises:
        ObjectMissing: no such version in the bucket.
        DatasetDamaged: the object is not what the version says, or this code cannot read it.
    """
    key = manifest_key(version)
    data = store.get_bytes(key)
    digest = hashlib.sha256(data).hexdigest()
    if digest != version:
        raise DatasetDamaged(
            f"{store.uri(key)} is damaged: its SHA-256 is {digest}; write it anew with --refresh preprocess"
        )
    try:
        return Manifest.from_bytes(data)
    except InputError as error:
        raise DatasetDamaged(f"{store.uri(key)}: {error}; write it anew with --refresh preprocess") from error


def is_stored(store: ObjectStore, shard: Shard) -> bool:
    """Whether the bucket has the shard, undamaged as far as its size and noted digest tell."""
    info = store.head(shard_key(shard))
    return info is not None and info.size == shard.bytes and info.sha256 in (None, shard.sha256)


def is_whole(store: ObjectStore, version: str) -> bool:
    """Whether a version's manifest and all its shards are in the bucket, as far as `is_stored` can tell."""
    try:
        manifest = load_manifest(store, version)
    except (ObjectMissing, DatasetDamaged):
        return False
    return all(_each(lambda shard: is_stored(store, shard), shards_of(manifest)))


def shards_of(manifest: Manifest) -> list[Shard]:
    """All different shards of all splits."""
    shards = (shard for split in manifest.splits.values() for shard in split.shards)
    return list({shard.sha256: shard for shard in shards}.values())


def open_split(cache: Cache, manifest: Manifest, split: Split) -> PackedSplit:
    """Map a split's shards from this machine's cache, after fetching those that are missing there.

    Raises:
        ObjectMissing: a shard is neither here nor in the bucket.
    """

    def fetch(shard: Shard) -> Path:
        return cache.fetch(shard_key(shard), shard.sha256, size=shard.bytes)

    return PackedSplit(_each(fetch, manifest.splits[split].shards))


def _each(work: Callable[[Shard], T], shards: Iterable[Shard]) -> list[T]:
    return in_parallel(work, shards, threading.Event())
