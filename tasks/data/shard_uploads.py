"""Uploads finished shards to the bucket while the next ones are packed."""

import shutil
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

from cnn.preprocessing.resume_records import PackedShard
from cnn.preprocessing.survey import Plan
from infra.settings import Settings
from infra.storage import bucket_layout
from infra.storage.cache import Cache
from tasks.data.dataset import is_stored
from tasks.data.preprocessing_journal import Journal

UPLOADS = 2  # in parallel
MAX_PENDING = 4  # shards that are not in the bucket yet; beyond it, packing waits for the oldest
CACHE_SHARE = 0.5  # of the free disk: a larger dataset version is not put into this machine's cache


class ShardStore:
    """Uploads shards in the background and records each uploaded shard in the journal.

    Args:
        keep: whether shards are put into the cache too, for a training on this machine.
        refresh: whether shards that the bucket has are uploaded again.
    """

    def __init__(self, cache: Cache, journal: Journal, *, keep: bool, refresh: bool) -> None:
        self._cache, self._journal = cache, journal
        self._keep, self._refresh = keep, refresh
        self._pool = ThreadPoolExecutor(UPLOADS, thread_name_prefix="shards")
        self._pending: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits until all shards are in the bucket; after an error, cancels uploads that have not begun."""
        self._pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            self._wait(0)

    def add(self, packed: PackedShard, path: Path) -> None:
        """Starts the upload of a shard; its file is moved or removed.

        Raises:
            ServiceError: an earlier shard could not be stored.
        """
        self._wait(MAX_PENDING - 1)
        own = path.rename(path.with_name(f"{packed.split}-{packed.number}"))  # shards of equal content share a name
        self._pending.append(self._pool.submit(self._store, packed, own))

    def _wait(self, most: int) -> None:
        """Waits until at most so many uploads are pending; raises the error of a failed upload."""
        while len(self._pending) > most or (self._pending and self._pending[0].done()):
            self._pending.popleft().result()

    def _store(self, packed: PackedShard, path: Path) -> None:
        shard, store = packed.shard, self._cache.store
        if self._refresh or not is_stored(store, shard):
            store.put_file(bucket_layout.shard(shard.sha256), path, sha256=shard.sha256)
        self._journal.note_shard(packed)
        if self._keep:
            self._cache.add_file(path)
        path.unlink()


def fits_cache(plan: Plan, cache: Cache) -> bool:
    """Returns whether this machine has space for the whole dataset version in its cache."""
    cache.root.mkdir(parents=True, exist_ok=True)
    most = CACHE_SHARE * shutil.disk_usage(cache.root).free
    return plan.pixel_bytes <= min(most, Settings().cache_bytes or most)
