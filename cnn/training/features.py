"""Computes the output of a frozen body once, rather than in each epoch, if only the head is trained.

Whether this is done depends on the configuration, the dataset version and the network, but neither on the number of
ranks nor on what is stored. Images pass the body in blocks of one size, so that a block has the same bits on any rank.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnn.config.training import TrainConfig
from cnn.data.manifest import Manifest
from cnn.data.split_reader import SplitReader
from cnn.distributed.lanes import Exchange
from cnn.training.finetune import head_of
from cnn.training.random_streams import generator, seed_default_generator

BLOCK = 64  # images; another size would change the last bits
MAX_BYTES = 2**30
"""Largest size of the features of both splits, which each rank has in memory."""


class Features(NamedTuple):
    """The features of a split, which take the place of its images."""

    path: Path
    images: Tensor
    """float32 [N, features, 1, 1]"""

    labels: Tensor
    """int64 [N]"""


class Tail(nn.Module):
    """The end of a network: dropout and the head. It shares the head's parameters with the network."""

    def __init__(self, network: nn.Module, *, dropout: float) -> None:
        super().__init__()
        self.dropout, self.head = dropout, head_of(network)

    def forward(self, features: Tensor) -> Tensor:
        """Maps features N×F×1×1 to logits N×classes."""
        logits: Tensor = self.head(F.dropout(features.flatten(1), self.dropout, self.training))
        return logits


def wants_features(config: TrainConfig, manifest: Manifest, network: nn.Module) -> bool:
    """Checks whether all epochs would compute the same features for a linear head, and whether they fit into memory."""
    same = config.finetune.freeze == "body" and config.finetune.freeze_epochs is None and not config.test_flip
    if not same or not config.augment.is_off:
        return False
    head, images = head_of(network), manifest.splits["train"].count + manifest.splits["val"].count
    return isinstance(head, nn.Linear) and images * head.in_features * 4 <= MAX_BYTES


def dropout_before_head(network: nn.Module, normalise: nn.Module, shape: tuple[int, int, int]) -> float | None:
    """Returns the probability with which a network with a frozen body drops features before its head.

    A network does not say what it computes between body and head. So each probability that it mentions is tried on
    random images: is `Tail` of the features what the network gives, bit for bit, with the same random numbers?

    Args:
        normalise: maps uint8 images to the network's input, on its device.
        shape: (C, H, W) of an image.

    Returns:
        None if nothing gives that: something else is random, or changes, in training; or the head is for parts of
        images.
    """
    network = copy.deepcopy(network)
    device = next(network.parameters()).device
    images = torch.randint(256, (2, *shape), generator=generator(torch.device("cpu"), "features"), dtype=torch.uint8)
    inputs = normalise(images.to(device))
    found = {module.p for module in network.modules() if isinstance(module, nn.Dropout)}
    found |= {float(getattr(network, "drop_rate", 0.0)), 0.0}  # timm's name, where dropout is not a module
    with torch.no_grad():
        seed_default_generator(device, "features")
        wanted = network(inputs)
        with _features(network) as features:
            network.eval()(inputs)
        if features[0].ndim != 2:
            return None
        for dropout in sorted(found):
            seed_default_generator(device, "features")
            if torch.equal(Tail(network, dropout=dropout).train()(features[0]), wanted):
                return dropout
    return None


@contextmanager
def _features(network: nn.Module) -> Iterator[list[Tensor]]:
    """Yields a list that holds the head's input, after each run of the network."""
    found: list[Tensor] = []
    handle = head_of(network).register_forward_pre_hook(lambda _, inputs: found.__setitem__(slice(None), inputs))
    try:
        yield found
    finally:
        handle.remove()


def compute_features(network: nn.Module, normalise: nn.Module, split: SplitReader, exchange: Exchange) -> Features:
    """Computes the features of a split in evaluation mode; each rank computes every W-th block, W being the world size.

    Args:
        network: equal on every rank, like `normalise`, which maps uint8 images to its input.
    """
    network = copy.deepcopy(network).eval()
    head, rank, ranks = head_of(network), exchange.rank, exchange.world_size
    result = torch.zeros(len(split), head.weight.shape[1], device=head.weight.device)
    with torch.no_grad(), _features(network) as features:
        for number, (images, _) in enumerate(split.blocks(BLOCK, first=rank, every=ranks)):
            full = torch.cat([images, images.new_zeros(BLOCK - len(images), *images.shape[1:])])
            network(normalise(full.to(result.device)))
            start = (rank + number * ranks) * BLOCK
            result[start : start + len(images)] = features[0][: len(images)]
    result += 0.0  # the sum with another rank's zeros would make -0.0 to 0.0
    return Features(Path("features"), exchange.submit(result).wait().cpu()[:, :, None, None], split.labels)
