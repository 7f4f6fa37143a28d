"""Finds, verifies and opens dataset versions in the bucket. Only opening loads torch."""

import hashlib
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cnn.data.manifest import Manifest, Shard
from cnn.data.splits import Split
from cnn.errors import InputError
from infra.errors import ServiceError, UsageError
from infra.machine.threads import in_parallel
from infra.records import Record
from infra.settings import Settings
from infra.storage import bucket_layout
from infra.storage.cache import Cache
from infra.storage.cache_limit import disk_limit
from infra.storage.object_store import ObjectStore
from infra.storage.s3_client import ObjectMissing

if TYPE_CHECKING:
    from cnn.data.shard_reader import RawShard
    from cnn.data.split_reader import SplitReader
    from cnn.data.streamed_split import StreamedSplit
    from infra.tracking.model_registry import RegisteredVersion

T = TypeVar("T")

MAX_HEAD_REQUESTS = 1000  # shards that are checked one by one; for more, listing the bucket is faster


class DatasetDamaged(ServiceError):
    """A dataset version in the bucket that does not match its digest."""


class DatasetRef(Record):
    """A dataset version in the bucket."""

    version: str
    """SHA-256 of its manifest."""

    name: str
    reused: bool = False
    """Whether it existed already."""


def load_manifest(store: ObjectStore, version: str) -> Manifest:
    """Reads and verifies a manifest.

    Raises:
        ObjectMissing: the bucket has no such version.
        DatasetDamaged: the object does not match the version, or this code cannot read it.
    """
    key = bucket_layout.dataset_manifest(version)
    data = store.get_bytes(key)
    digest = hashlib.sha256(data).hexdigest()
    if digest != version:
        raise DatasetDamaged(
            f"{store.uri(key)} is damaged: its SHA-256 is {digest}; write it again with --refresh preprocess"
        )
    try:
        return Manifest.from_bytes(data)
    except InputError as error:
        raise DatasetDamaged(f"{store.uri(key)}: {error}; write it again with --refresh preprocess") from error


def dataset_of(store: ObjectStore, version: "RegisteredVersion") -> Manifest:
    """Returns the manifest of the data that a version was trained on.

    Raises:
        UsageError: they are no longer in the bucket.
        DatasetDamaged: see `load_manifest`.
    """
    wanted = version.required("dataset_version")
    try:
        return load_manifest(store, wanted)
    except ObjectMissing:
        raise UsageError(
            f"dataset version {wanted} of {version.address} was removed from the bucket; choose a newer version"
        ) from None


def is_stored(store: ObjectStore, shard: Shard) -> bool:
    """Returns whether the bucket has the shard, judged by its size and, if noted there, its digest."""
    info = store.head(bucket_layout.shard(shard.sha256))
    return info is not None and info.size == shard.bytes and info.sha256 in (None, shard.sha256)


def is_complete(store: ObjectStore, version: str) -> bool:
    """Returns whether the bucket has a version's manifest and all its shards, judged as by `is_stored`."""
    try:
        manifest = load_manifest(store, version)
    except (ObjectMissing, DatasetDamaged):
        return False
    shards = shards_of(manifest)
    if len(shards) <= MAX_HEAD_REQUESTS:
        return all(in_parallel(lambda shard: is_stored(store, shard), shards))
    sizes = {info.key: info.size for info in store.list(bucket_layout.SHARDS)}
    return all(sizes.get(bucket_layout.shard(shard.sha256)) == shard.bytes for shard in shards)


def shards_of(manifest: Manifest) -> list[Shard]:
    """Returns the distinct shards of all splits."""
    shards = (shard for split in manifest.splits.values() for shard in split.shards)
    return list({shard.sha256: shard for shard in shards}.values())


def open_cache(store: ObjectStore, kind: type[Cache] = Cache) -> Cache:
    """Returns this machine's cache, limited by CONVOY_CACHE_BYTES or by the free space on its disk."""
    settings = Settings()
    return kind(settings.cache, store, limit=settings.cache_bytes or disk_limit(settings.cache))


def fits(cache: Cache, manifest: Manifest) -> bool:
    """Returns whether the cache may hold all shards of a dataset version."""
    return cache.limit is None or sum(shard.bytes for shard in shards_of(manifest)) <= cache.limit


def open_split(cache: Cache, manifest: Manifest, split: Split) -> "SplitReader":
    """Opens a split for reading: fetches all its shards and maps them, if the cache may hold the whole version.

    Otherwise, or if the images are encoded, shards are fetched when they are needed. The images are the same.

    Raises:
        ObjectMissing: a shard is neither in the cache nor in the bucket; raised when the shard is fetched.
    """
    if manifest.encoding == "raw" and fits(cache, manifest):
        from cnn.data.mapped_split import MappedSplit

        return MappedSplit(in_parallel(partial(_map, cache, _shape(manifest)), manifest.splits[split].shards))
    return stream_split(cache, manifest, split)


def stream_split(cache: Cache, manifest: Manifest, split: Split, *, ahead: int | None = None) -> "StreamedSplit":
    """Returns a reader that fetches the split's shards when they are needed.

    Args:
        ahead: bytes to fetch in advance; None: a quarter of the cache's limit, shared by this machine's ranks, and at
            most `cnn.data.streamed_split.AHEAD_BYTES`.
    """
    from cnn.data.streamed_split import AHEAD_BYTES, StreamedSplit

    if ahead is None:
        ahead = AHEAD_BYTES if cache.limit is None else min(AHEAD_BYTES, cache.limit // 4 // local_ranks())
    shards = manifest.splits[split].shards
    return StreamedSplit(shards, _shape(manifest), partial(_fetch, cache), encoding=manifest.encoding, ahead=ahead)


def local_ranks() -> int:
    """Returns the number of this training's ranks on this machine, from torchrun's environment."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _shape(manifest: Manifest) -> tuple[int, int, int]:
    return manifest.channels, manifest.image_size, manifest.image_size


def _fetch(cache: Cache, shard: Shard) -> Path:
    return cache.fetch(bucket_layout.shard(shard.sha256), shard.sha256, size=shard.bytes)


def _map(cache: Cache, shape: tuple[int, int, int], shard: Shard) -> "RawShard":
    from cnn.data.shard_reader import RawShard, fetch_and_open

    mapped = fetch_and_open(shard, partial(_fetch, cache), shape=shape, encoding="raw")
    assert isinstance(mapped, RawShard)
    return mapped
