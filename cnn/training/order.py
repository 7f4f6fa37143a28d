"""Chooses the images of each step: a pure function of the configuration and of the split's entry in the manifest.

The number of ranks and the place of shards have no influence. There are three ways:

- **all**: one random permutation of all images per epoch. Every machine needs all shards all the time.
- **balanced**: the classes take turns, and each class goes through permutations of its images, one after another; an
  epoch is a stretch of this line, in random order. The order depends on the images' labels too.
- **a window**: the images of all shards, in a random order of shards, form a line, which is cut into one equal stretch
  per lane. Each lane moves a window evenly along its stretch, and draws images at random from the window: a machine
  needs only the shards of its own lanes, and these one after another.

The shuffle buffers of tf.data and WebDataset are also sliding windows over a random order of shards. Here the order is
known before anything is read, and is equal for every world size.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cnn.config.training import TrainConfig
from cnn.data.manifest import SplitInfo
from cnn.errors import InputError
from cnn.training.random_streams import epoch_order, generator

MAX_PERMUTED_BYTES = 64 * 2**30
"""Largest split, in bytes of its shards, that is permuted as a whole if the window is unset."""

DEFAULT_WINDOW_BYTES = 4 * 2**30
"""Bytes of a larger split that are mixed at a time."""

CPU = torch.device("cpu")

CLASS_BLOCK = 4096
"""Images per block of permutations of one class: a class of few images has many permutations per epoch."""


def shuffle_window(config: TrainConfig, split: SplitInfo) -> int | None:
    """Returns the number of images that are mixed at a time, over all lanes; None: all of the split."""
    total = sum(shard.bytes for shard in split.shards)
    window = config.shuffle_window
    if window is None and total > MAX_PERMUTED_BYTES:
        window = max(1, split.count * DEFAULT_WINDOW_BYTES // total)
    return window if window is not None and window < split.count else None


def check_sampling(config: TrainConfig, split: SplitInfo) -> None:
    """Refuses balanced sampling of images that are mixed by a window.

    Raises:
        InputError: it says why.
    """
    if config.sampling == "balanced" and (window := shuffle_window(config, split)) is not None:
        raise InputError(
            f"sampling=balanced needs all {split.count} training images at any time, but only {window} are mixed at a "
            "time (shuffle_window, or more than 64 GiB of shards); leave shuffle_window unset, or use "
            "class_weights=balanced in place of sampling"
        )


class Order:
    """The order of the training images; the split must have at least one batch.

    Args:
        labels: returns those of all images of the split, int64; called if the sampling is balanced.

    Raises:
        InputError: the sampling is balanced, and images are mixed by a window.
    """

    def __init__(self, config: TrainConfig, split: SplitInfo, labels: Callable[[], Tensor] | None = None) -> None:
        check_sampling(config, split)
        self._seed, self._lanes = config.seed, config.lanes
        self._lane_batch = config.batch_size // config.lanes
        self._count = split.count
        self.window = shuffle_window(config, split)
        """See `shuffle_window`."""

        self.steps_per_epoch = split.count // config.batch_size
        self._sizes = torch.tensor([shard.count for shard in split.shards])
        self._by_class: tuple[Tensor, ...] | None = None
        if config.sampling == "balanced":
            assert labels is not None
            of_all = labels()
            counts = torch.bincount(of_all)
            self._by_class = of_all.argsort(stable=True).split_with_sizes(counts[counts > 0].tolist())

    def epoch(self, epoch: int, lanes: range) -> Tensor:
        """Returns the images of each step of an epoch in some lanes, as positions in the split.

        None occurs twice, unless the sampling is balanced. Images that do not fill a batch are left out; each epoch
        leaves out others. The result takes 8 bytes per image; while it is computed, some tens of bytes with balanced
        sampling, and 40 bytes per image of a lane's part with a window.

        Returns:
            int64 [steps, lanes, images of a lane's batch].
        """
        shape = (self.steps_per_epoch, self._lanes, self._lane_batch)
        if self._by_class:
            return self._balanced(epoch, self._by_class).view(shape)[:, lanes.start : lanes.stop]
        if self.window is None:
            order = epoch_order(self._seed, epoch, self._count)[: torch.Size(shape).numel()].view(shape)
            return order[:, lanes.start : lanes.stop]
        shards = torch.randperm(len(self._sizes), generator=generator(CPU, self._seed, "order", epoch))
        order = torch.empty(shape[0], len(lanes), shape[2], dtype=torch.int64)
        for place, lane in enumerate(lanes):
            order[:, place] = self._stretch(epoch, lane, shards).view(shape[0], shape[2])
        return order

    def _balanced(self, epoch: int, classes: tuple[Tensor, ...]) -> Tensor:
        """Returns all images of an epoch, in order: the classes take turns over all epochs, and each epoch is mixed."""
        count = self.steps_per_epoch * self._lanes * self._lane_batch
        drawn = torch.empty(count, dtype=torch.int64)
        for number, images in enumerate(classes):
            first = (number - epoch * count) % len(classes)  # turn of the class in this epoch
            if turns := range(epoch * count + first, (epoch + 1) * count, len(classes)):
                drawn[first :: len(classes)] = self._class_line(number, images, turns.start // len(classes), len(turns))
        return drawn[epoch_order(self._seed, epoch, count)]

    def _class_line(self, number: int, images: Tensor, start: int, count: int) -> Tensor:
        """Returns a stretch of the line of a class: permutations of its images, one after another."""
        permutations = max(1, CLASS_BLOCK // len(images))
        block = permutations * len(images)
        first, last = start // block, (start + count - 1) // block
        keys = torch.empty(last - first + 1, permutations, len(images), dtype=torch.float64)
        for each, part in zip(range(first, last + 1), keys, strict=True):
            part.uniform_(generator=generator(CPU, self._seed, "class", number, each))
        return images[keys.argsort(dim=2, stable=True)].flatten()[start - first * block :][:count]

    def _stretch(self, epoch: int, lane: int, shards: Tensor) -> Tensor:
        """Returns a lane's images of an epoch, in order; `shards` is the order of all shards."""
        assert self.window is not None
        length = self.steps_per_epoch * self._lane_batch
        start, stop = lane * length, (lane + 1) * length
        ends = self._sizes[shards].cumsum(0)
        begins = ends - self._sizes[shards]
        # The difference between an image's position in the split and its position in the line, per shard.
        shift = (self._sizes.cumsum(0) - self._sizes)[shards] - begins
        inside = (ends.clamp(max=stop) - begins.clamp(min=start)).clamp(min=0)
        line = torch.arange(start, stop) + shift.repeat_interleave(inside)
        width = max(1, self.window // self._lanes)
        keys = torch.randint(width, (length,), generator=generator(CPU, self._seed, "order", epoch, lane))
        keys += torch.arange(length)
        return line[keys.argsort(stable=True)]


def mixing(split: SplitInfo, window: int | None, *, batch_size: int, lanes: int) -> float:
    """Returns how unevenly batches are mixed in the worst case, in which every shard has images of one class only.

    The result is the variance of a class's share of a batch, relative to batches drawn at random from all images: 1 is
    a perfect mixture. Two images in a lane's batch come from any places of a window of w = window / lanes images, so
    their distance d has the density 2 (w - d) / w², and they share a shard of m images with the probability
    max(0, 1 - d / m); on average that is

        s(m) = m / w · (1 - m / 3w)   for m ≤ w,   else   1 - w / 3m.

    Images of one shard are of one class; images of different shards, and lanes, are independent. With b images in a
    batch the variance is therefore 1 + (b / lanes - 1) · s times that of b independent images, s being the average over
    all images: about 1 + (b - lanes) · m / window. This holds for many shards, and away from the ends of a stretch,
    where the window opens and closes and less is mixed. If images were packed in random order, the result is 1.

    The result is for one batch. Neighbouring batches draw from the same shards, so with images packed class by class
    the network sees only the classes of window / m shards while a window passes.
    """
    if window is None:
        return 1.0
    width = max(1, window // lanes)
    sizes = torch.tensor([shard.count for shard in split.shards], dtype=torch.float64)
    same = torch.where(sizes <= width, sizes / width * (1 - sizes / (3 * width)), 1 - width / (3 * sizes))
    return 1 + (batch_size / lanes - 1) * float((same * sizes).sum() / sizes.sum())
