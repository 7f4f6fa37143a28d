"""Counts a network's arithmetic, and measures what a device can do at most."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

SIDE = {"cpu": 768, "cuda": 8192}
"""Rows and columns of the matrices whose product is timed: some 20 ms on a core, some 20 to 50 ms on a GPU."""

PRODUCTS = 3  # the fastest counts


class Operations:
    """The number of floating-point operations so far."""

    count = 0


@contextmanager
def counted_operations(network: nn.Module) -> Iterator[Operations]:
    """Counts the operations of a training step of the network while the block runs its forward pass.

    Convolutions and linear layers count, each multiplication and addition as one: once forward, and once each for the
    gradients of weights and of inputs that backward computes. Normalisation, activations and the products of attention
    do not count. (`torch.utils.flop_counter` loads torch.compile, which takes seconds.)
    """
    operations = Operations()

    def add(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        weight, given = layer.weight, inputs[0] if inputs else None
        if not (isinstance(weight, Tensor) and isinstance(given, Tensor) and isinstance(output, Tensor)):
            return  # a layer of one's own that is called otherwise
        # Each value of the output, or of a transposed convolution's input, meets all weights of its channel.
        values = given if isinstance(layer, nn.modules.conv._ConvTransposeNd) else output
        passes = 1 + weight.requires_grad + given.requires_grad
        operations.count += 2 * values.numel() * weight[0].numel() * passes

    layers = [layer for layer in network.modules() if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd)]
    handles = [layer.register_forward_hook(add) for layer in layers]
    try:
        yield operations
    finally:
        for handle in handles:
            handle.remove()


def peak(device: torch.device, *, bfloat16: bool = False) -> float:
    """Measures a device's floating-point operations per second in one large matrix product.

    All ranks of a machine call it at the same time, as they later compute.
    """
    side = SIDE[device.type]
    matrix = torch.ones(side, side, device=device, dtype=torch.bfloat16 if bfloat16 else torch.float32)
    torch.mm(matrix, matrix)
    seconds = []
    for _ in range(PRODUCTS):
        _finish(device)
        began = time.perf_counter()
        torch.mm(matrix, matrix)
        _finish(device)
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
