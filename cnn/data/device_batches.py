"""Brings the batches of a training to its device before they are used."""

from collections.abc import Generator, Iterable, Iterator

import torch
from torch import Tensor

from cnn.data.mapped_split import MappedSplit
from cnn.data.read_ahead import read_ahead
from cnn.data.split_reader import Batch, SplitReader

RESIDENT_SHARE = 0.25
"""Largest share of a GPU's free memory, before the first step, that the training split may take."""

AHEAD = 2  # batches that are copied to a GPU before they are used
BLOCK = 4096  # images that are copied to a GPU at a time


def device_batches(split: SplitReader, orders: Iterable[Tensor], device: torch.device) -> Iterator[Batch]:
    """Yields the images and labels of all rows of each order (int64 [rows, n]), in sequence, on a device.

    A GPU holds the whole split if that is small, and gathers from it. Otherwise a thread gathers each batch in host
    memory and copies it while the GPU computes.
    """
    if device.type != "cuda":
        return split.batches(orders)
    if isinstance(split, MappedSplit) and split.nbytes <= RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]:
        return resident_batches(split, orders, device)
    return _copied_ahead(split.batches(orders), device)


def resident_batches(split: SplitReader, orders: Iterable[Tensor], device: torch.device) -> Iterator[Batch]:
    """Copies all images to the device, then gathers the batches there."""
    first, _ = split.slice(0, 1)
    images = torch.empty((len(split), *split.shape), dtype=first.dtype, device=device)
    for number, (block, _) in enumerate(split.blocks(BLOCK)):
        images[number * BLOCK :][: len(block)] = block
    labels = split.labels.to(device)
    for order in orders:
        for row in order.to(device):
            yield images.index_select(0, row), labels.index_select(0, row)


def _copied_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Copies batches to a GPU on a stream of their own, from pinned memory, so that neither host nor GPU waits."""
    copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copied() -> Generator[tuple[Batch, torch.cuda.Event], None, None]:
        torch.cuda.set_device(device)  # this thread's; otherwise it takes memory on the first GPU, too
        for images, labels in batches:
            with torch.cuda.stream(copies):
                batch = (
                    images.pin_memory().to(device, non_blocking=True),
                    labels.pin_memory().to(device, non_blocking=True),
                )
            yield batch, copies.record_event()

    for batch, done in read_ahead(copied(), AHEAD):
        now = torch.cuda.current_stream(device)
        now.wait_event(done)
        for tensor in batch:  # so that memory of the other stream is not reused before its last use on this one
            tensor.record_stream(now)
        yield batch
