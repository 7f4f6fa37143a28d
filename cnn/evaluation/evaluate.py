"""Evaluates networks exactly: every image once, without padding, with equal results for every world size."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnn.data.split_reader import Batch, SplitReader
from cnn.distributed.lanes import Exchange
from cnn.distributed.process_group import THREADS_PER_RANK, without_tf32

EVAL_BATCH = 250  # images at most
EVAL_PIXELS = 1 << 21  # per channel: EfficientNet-Lite0's activations of so many pixels take half a gigabyte
MAX_PARALLEL_BATCHES = 8  # on a CPU; each takes memory for its activations


@dataclass(frozen=True, kw_only=True)
class Score:
    """Mean cross-entropy (nats, no label smoothing) and share of correct predictions over a split."""

    loss: float
    accuracy: float


def eval_batch(split: SplitReader) -> int:
    """Returns the number of images per batch, by their size alone: another number changes the last bits of a result."""
    _, height, width = split.shape
    return max(1, min(EVAL_BATCH, EVAL_PIXELS // (height * width)))


def predict_logits(
    network: nn.Module, split: SplitReader, device: torch.device, *, on_progress: Callable[[int], None] = lambda _: None
) -> Tensor:
    """Returns the logits of every image of a split, in its order: float32 N×classes, on the CPU.

    On a CPU several batches are computed in parallel, each on as many threads as a rank has, so the bits do not depend
    on the number of cores.

    Args:
        network: takes uint8 images, and includes normalisation.
        on_progress: called with the number of images that were evaluated since the last call.
    """
    parts = []
    with _evaluating(network):
        for logits in _outputs(partial(_logits, network, device), split.blocks(eval_batch(split)), device):
            parts.append(logits)
            on_progress(len(logits))
    return torch.cat(parts)


@torch.inference_mode()  # a state per thread
def _logits(network: nn.Module, device: torch.device, images: Tensor) -> Tensor:
    logits: Tensor = network(images.to(device))
    return logits.float().cpu()


def _outputs(forward: Callable[[Tensor], Tensor], blocks: Iterable[Batch], device: torch.device) -> Iterator[Tensor]:
    """Yields the output of `forward` for each block's images, in their order."""
    if device.type != "cpu":
        yield from (forward(images) for images, _ in blocks)
        return
    threads, workers = torch.get_num_threads(), min(MAX_PARALLEL_BATCHES, len(os.sched_getaffinity(0)))
    waiting: deque[Future[Tensor]] = deque()
    try:
        with ThreadPoolExecutor(workers, "evaluate", torch.set_num_threads, (THREADS_PER_RANK,)) as pool:
            for images, _ in blocks:
                waiting.append(pool.submit(forward, images))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        torch.set_num_threads(threads)  # the workers' setting also affects later threads


def evaluate(network: nn.Module, split: SplitReader, device: torch.device, exchange: Exchange) -> Score:
    """Computes the score of a split; each rank evaluates every W-th batch, W being the world size.

    Ranks exchange the sums of each batch rather than sums per rank, and add them in one order, so that the number of
    ranks cannot change the result.

    Args:
        network: takes uint8 images, and includes normalisation; equal on every rank.
    """
    rank, ranks, size = exchange.rank, exchange.world_size, eval_batch(split)
    sums = torch.zeros(-(-len(split) // size), 2, dtype=torch.float64, device=device)
    with _evaluating(network):
        for batch, (images, labels) in enumerate(split.blocks(size, first=rank, every=ranks)):
            labels = labels.to(device)
            logits = network(images.to(device)).float()
            row = sums[rank + batch * ranks]
            row[0] = F.cross_entropy(logits, labels, reduction="sum")
            row[1] = (logits.argmax(1) == labels).sum()
    loss, correct = exchange.submit(sums).wait().sum(0).tolist()
    return Score(loss=loss / len(split), accuracy=correct / len(split))


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    in_training = [module for module in network.modules() if module.training]  # frozen layers are not
    network.eval()
    try:
        # Without, since a served version is compared with the evaluation, and runs on other devices.
        with without_tf32(), torch.inference_mode():
            yield
    finally:
        for module in in_training:
            module.training = True
