"""Dataset versions in the bucket: where they are, whether they are whole, and opening them for reading.

Only opening loads torch.
"""

import hashlib
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel, ConfigDict

from cnn.data.manifest import Manifest, Shard
from cnn.data.splits import Split
from cnn.errors import InputError
from infra.errors import ServiceError
from infra.machine.threads import in_parallel
from infra.settings import Settings
from infra.storage import bucket_layout
from infra.storage.cache import Cache
from infra.storage.cache_limit import disk_limit
from infra.storage.object_store import ObjectMissing, ObjectStore

if TYPE_CHECKING:
    from cnn.data.shard_reader import RawShard
    from cnn.data.split_reader import SplitReader
    from cnn.data.streamed_split import StreamedSplit

T = TypeVar("T")

ASKED_ONE_BY_ONE = 1000  # shards; of more, a listing of the bucket's is quicker


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


def load_manifest(store: ObjectStore, version: str) -> Manifest:
    """Read and verify a manifest.

    Raises:
        ObjectMissing: no such version in the bucket.
        DatasetDamaged: the object is not what the version says, or this code cannot read it.
    """
    key = bucket_layout.dataset_manifest(version)
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
    info = store.head(bucket_layout.shard(shard.sha256))
    return info is not None and info.size == shard.bytes and info.sha256 in (None, shard.sha256)


def is_whole(store: ObjectStore, version: str) -> bool:
    """Whether a version's manifest and all its shards are in the bucket, as far as `is_stored` can tell."""
    try:
        manifest = load_manifest(store, version)
    except (ObjectMissing, DatasetDamaged):
        return False
    shards = shards_of(manifest)
    if len(shards) <= ASKED_ONE_BY_ONE:
        return all(_each(lambda shard: is_stored(store, shard), shards))
    sizes = {info.key: info.size for info in store.list(bucket_layout.SHARDS)}
    return all(sizes.get(bucket_layout.shard(shard.sha256)) == shard.bytes for shard in shards)


def shards_of(manifest: Manifest) -> list[Shard]:
    """All different shards of all splits."""
    shards = (shard for split in manifest.splits.values() for shard in split.shards)
    return list({shard.sha256: shard for shard in shards}.values())


def open_cache(store: ObjectStore) -> Cache:
    """This machine's cache, held within CONVOY_CACHE_BYTES or what its disk has to spare."""
    settings = Settings()
    return Cache(settings.cache, store, limit=settings.cache_bytes or disk_limit(settings.cache))


def fits(cache: Cache, manifest: Manifest) -> bool:
    """Whether the cache may hold all shards of a dataset version."""
    return cache.limit is None or sum(shard.bytes for shard in shards_of(manifest)) <= cache.limit


def open_split(cache: Cache, manifest: Manifest, split: Split) -> "SplitReader":
    """Opens a split for reading: mapped, each shard as it is fetched, if all of the version may be here.

    Otherwise, or if the images are encoded, its shards come when they are needed. The images are the same.

    Raises:
        ObjectMissing: a shard is neither here nor in the bucket; when it is needed, if they come then.
    """
    if manifest.encoding == "raw" and fits(cache, manifest):
        from cnn.data.mapped_split import PackedSplit

        return PackedSplit(_each(partial(_map, cache, _shape(manifest)), manifest.splits[split].shards))
    return stream_split(cache, manifest, split)


def stream_split(cache: Cache, manifest: Manifest, split: Split, *, ahead: int | None = None) -> "StreamedSplit":
    """A reader that fetches the split's shards when they are needed.

    Args:
        ahead: bytes that may be here before; unset: a quarter of what the cache may hold, shared by this machine's
            ranks, and no more than `cnn.data.streamed_split.AHEAD_BYTES`.
    """
    from cnn.data.streamed_split import AHEAD_BYTES, StreamedSplit

    if ahead is None:
        ahead = AHEAD_BYTES if cache.limit is None else min(AHEAD_BYTES, cache.limit // 4 // local_ranks())
    shards = manifest.splits[split].shards
    return StreamedSplit(shards, _shape(manifest), partial(_fetch, cache), encoding=manifest.encoding, ahead=ahead)


def local_ranks() -> int:
    """Ranks of this training on this machine, as torchrun says."""
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


def _each(work: Callable[[Shard], T], shards: Iterable[Shard]) -> list[T]:
    return in_parallel(work, shards)
