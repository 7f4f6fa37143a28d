"""Opens the training split: all of it on every machine, or only the shards that a machine's lanes need at a time."""

from rich.filesize import decimal

from cnn.config.training import TrainConfig
from cnn.data.manifest import Manifest, SplitInfo
from cnn.data.split_reader import SplitReader
from cnn.data.streamed_split import AHEAD_BYTES
from cnn.training.order import shuffle_window
from infra.errors import UsageError
from infra.storage.cache import Cache
from tasks.data.dataset import fits, local_ranks, open_split, shards_of, stream_split

CACHE_SHARE = 0.75  # of the cache's limit, for the training split: the validation split is read in between


def open_training_split(cache: Cache, manifest: Manifest, config: TrainConfig, world_size: int) -> SplitReader:
    """Opens the training split for a rank.

    Raises:
        ObjectMissing: a shard is neither in the cache nor in the bucket.
        UsageError: the cache may not hold the shards that this machine's lanes need at a time: each step would fetch
            them again.
    """
    info, window = manifest.splits["train"], shuffle_window(config, manifest.splits["train"])
    if fits(cache, manifest):
        return open_split(cache, manifest, "train") if window is None else stream_split(cache, manifest, "train")
    assert cache.limit is not None
    ranks = local_ranks()
    lanes = config.lanes * ranks // world_size
    largest = max(shard.bytes for shard in info.shards)
    needed = bytes_at_a_time(info, window, lanes=config.lanes, lanes_here=lanes)
    ahead = int(CACHE_SHARE * cache.limit - needed) // ranks
    if ahead < largest:
        possible = _largest_window(info, int(CACHE_SHARE * cache.limit) - ranks * largest, config.lanes, lanes)
        advice = f"shuffle_window to at most {possible}, or " if possible >= config.batch_size else ""
        whole = sum(shard.bytes for shard in shards_of(manifest))
        enough = min(int((needed + ranks * largest) / CACHE_SHARE) + 1, whole)
        raise UsageError(
            f"the cache may hold {decimal(cache.limit)} here (CONVOY_CACHE_BYTES, or the free space on the disk), but "
            f"training on {'all images' if window is None else f'a window of {window} images'} at a time takes "
            f"{decimal(enough)}; set {advice}CONVOY_CACHE_BYTES to that"
        )
    return stream_split(cache, manifest, "train", ahead=min(ahead, AHEAD_BYTES))


def bytes_at_a_time(split: SplitInfo, window: int | None, *, lanes: int, lanes_here: int) -> int:
    """Returns the most bytes of shards that `lanes_here` of the lanes need at a time."""
    total = sum(shard.bytes for shard in split.shards)
    if window is None:
        return total
    edges = 2 * max(shard.bytes for shard in split.shards)  # a window may begin and end within a shard
    return min(total, lanes_here * (window // lanes * total // split.count + edges))


def _largest_window(split: SplitInfo, limit: int, lanes: int, lanes_here: int) -> int:
    """Returns the largest window whose `bytes_at_a_time` is within a limit in bytes."""
    edges = 2 * max(shard.bytes for shard in split.shards)
    total = sum(shard.bytes for shard in split.shards)
    return max(0, (limit // lanes_here - edges) * split.count // total) * lanes
