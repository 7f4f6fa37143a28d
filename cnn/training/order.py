"""Which images each step takes: a pure function of the configuration and of what the manifest says of the split.

Neither the number of ranks nor what lies on which machine plays a part. There are two ways:

- **all**: one random permutation of all images an epoch. Every machine needs every shard all the time.
- **a window**: the shards in random order, their images laid end to end, and this line cut into as many equal
  stretches as there are lanes. Each lane goes along its own stretch with a window that slides evenly, and takes images
  at random from what is inside: shards come into use one after another and go out of use one after another, and a
  machine needs those of its own lanes only.

Sliding windows over a random order of shards are what tf.data and WebDataset do as shuffle buffers; here the outcome
is known before anything is read, for every world size the same.
"""

import torch
from torch import Tensor

from cnn.config.training import TrainConfig
from cnn.data.manifest import SplitInfo
from cnn.training.random_streams import epoch_order, generator

WHOLE_BYTES = 64 * 2**30
"""A split with no more than this in its shards is permuted as a whole, unless a window is asked for."""

WINDOW_BYTES = 4 * 2**30
"""Of a larger one, so much is mixed at a time."""

CPU = torch.device("cpu")


def shuffle_window(config: TrainConfig, split: SplitInfo) -> int | None:
    """Images that are mixed at a time, over all lanes; None: all of the split."""
    total = sum(shard.bytes for shard in split.shards)
    window = config.shuffle_window
    if window is None and total > WHOLE_BYTES:
        window = max(1, split.count * WINDOW_BYTES // total)
    return window if window is not None and window < split.count else None


class Order:
    """The order of the training images.

    Args:
        split: the training split, with at least a batch of images.
    """

    def __init__(self, config: TrainConfig, split: SplitInfo) -> None:
        self._seed, self._lanes = config.seed, config.lanes
        self._lane_batch = config.batch_size // config.lanes
        self._count = split.count
        self.window = shuffle_window(config, split)
        """Images that are mixed at a time, over all lanes; None: all of them."""

        self.steps_per_epoch = split.count // config.batch_size
        self._sizes = torch.tensor([shard.count for shard in split.shards])

    def epoch(self, epoch: int, lanes: range) -> Tensor:
        """The images of each step of an epoch in some lanes, as positions in the split; none occurs twice.

        What does not fill a batch is left out, which is another part of the split in each epoch. The answer takes 8
        bytes an image; with a window, a lane's part takes 40 while it is made.

        Returns:
            int64 [steps, lanes, images of a lane's batch].
        """
        shape = (self.steps_per_epoch, self._lanes, self._lane_batch)
        if self.window is None:
            order = epoch_order(self._seed, epoch, self._count)[: torch.Size(shape).numel()].view(shape)
            return order[:, lanes.start : lanes.stop]
        shards = torch.randperm(len(self._sizes), generator=generator(CPU, self._seed, "order", epoch))
        made = torch.empty(shape[0], len(lanes), shape[2], dtype=torch.int64)
        for place, lane in enumerate(lanes):
            made[:, place] = self._stretch(epoch, lane, shards).view(shape[0], shape[2])
        return made

    def _stretch(self, epoch: int, lane: int, shards: Tensor) -> Tensor:
        """A lane's images of an epoch, in order; `shards` is the order of all shards."""
        assert self.window is not None
        length = self.steps_per_epoch * self._lane_batch
        start, stop = lane * length, (lane + 1) * length
        ends = self._sizes[shards].cumsum(0)
        begins = ends - self._sizes[shards]
        # What is to be added to a position in the line to get the one in the split, for each image of the stretch.
        shift = (self._sizes.cumsum(0) - self._sizes)[shards] - begins
        inside = (ends.clamp(max=stop) - begins.clamp(min=start)).clamp(min=0)
        line = torch.arange(start, stop) + shift.repeat_interleave(inside)
        width = max(1, self.window // self._lanes)
        keys = torch.randint(width, (length,), generator=generator(CPU, self._seed, "order", epoch, lane))
        keys += torch.arange(length)
        return line[keys.argsort(stable=True)]


def mixing(split: SplitInfo, window: int | None, *, batch_size: int, lanes: int) -> float:
    """How unevenly batches are mixed at worst, which is if every shard holds images of one class only.

    It is the variance of a class's share of a batch, relative to that in batches drawn at random from all images: 1 is
    a perfect mixture. Of two images in a lane's batch, each comes from any place of a window of w = window / lanes
    images, so their distance d has the density 2 (w - d) / w², and they share a shard of m images with the probability
    max(0, 1 - d / m); on the average that is

        s(m) = m / w · (1 - m / 3w)   for m ≤ w,   else   1 - w / 3m.

    Images of one shard are of one class, all others are independent, and so are lanes. With b images in a batch the
    variance is therefore 1 + (b / lanes - 1) · s times that of b independent images, s being the average over all
    images: about 1 + (b - lanes) · m / window. It holds for many shards, between the ends of a stretch: a window opens
    and closes there, and less is mixed. If the images were in random order before they were packed, it is 1.

    The number is of one batch. Batches near to each other are of the same shards, so with classes packed one after
    another the network sees window / m shards' classes for as long as a window takes.
    """
    if window is None:
        return 1.0
    width = max(1, window // lanes)
    sizes = torch.tensor([shard.count for shard in split.shards], dtype=torch.float64)
    same = torch.where(sizes <= width, sizes / width * (1 - sizes / (3 * width)), 1 - width / (3 * sizes))
    return 1 + (batch_size / lanes - 1) * float((same * sizes).sum() / sizes.sum())
