"""Exact evaluation: every image once, no padding, and the same numbers for every world size."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnn.lanes import Exchange
from cnn.reading import SplitReader

EVAL_BATCH = 250  # images; part of the result's last bits, hence no option


@dataclass(frozen=True, kw_only=True)
class Score:
    """Mean cross-entropy (nats, no label smoothing) and share of correct predictions over a split."""

    loss: float
    accuracy: float


def predict_logits(
    network: nn.Module, split: SplitReader, device: torch.device, *, on_progress: Callable[[int], None] = lambda _: None
) -> Tensor:
    """Logits of every image of a split, in its order: float32 N×classes, on the CPU.

    Args:
        network: takes uint8 images, normalisation included.
        on_progress: called with the number of images done since the last call.
    """
    parts = []
    with _evaluating(network):
        for images, _ in split.blocks(EVAL_BATCH):
            parts.append(network(images.to(device)).float().cpu())
            on_progress(len(images))
    return torch.cat(parts)


def evaluate(network: nn.Module, split: SplitReader, device: torch.device, exchange: Exchange) -> Score:
    """Score a split, each rank taking every world-size-th batch.

    The sums of each batch travel, not those of each rank, and are added in one order, so that the number of ranks
    cannot change the result.

    Args:
        network: takes uint8 images, normalisation included; equal on every rank.
    """
    rank, ranks = exchange.rank, exchange.world_size
    sums = torch.zeros(-(-len(split) // EVAL_BATCH), 2, dtype=torch.float64, device=device)
    with _evaluating(network):
        for batch, (images, labels) in enumerate(split.blocks(EVAL_BATCH, first=rank, every=ranks)):
            labels = labels.to(device)
            logits = network(images.to(device)).float()
            row = sums[rank + batch * ranks]
            row[0] = F.cross_entropy(logits, labels, reduction="sum")
            row[1] = (logits.argmax(1) == labels).sum()
    loss, correct = exchange.submit(sums).wait().sum(0).tolist()
    return Score(loss=loss / len(split), accuracy=correct / len(split))


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    was_training = network.training
    network.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        network.train(was_training)
