"""Operations are counted as PyTorch does, whose counter errs in the backward pass of grouped convolutions only."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cnn.config.training import TrainConfig
from cnn.networks.build import build_network
from cnn.training.arithmetic import counted_operations, peak

TRANSPOSED = nn.Sequential(nn.ConvTranspose2d(3, 8, 3, stride=2), nn.Flatten(), nn.LazyLinear(10))


@pytest.mark.parametrize("name", ["notes", "convoy9", "resnet18", "transposed"])
@pytest.mark.parametrize("frozen", [False, True], ids=["all trained", "first layers frozen"])
def test_operations_are_those_that_pytorch_counts(name: str, frozen: bool) -> None:
    images = torch.rand(2, 3, 32, 32)
    if name == "transposed":
        network: nn.Module = TRANSPOSED
        network(images)
        network.requires_grad_(True)
    else:
        network = build_network(TrainConfig(model=name), channels=3, image_size=32, classes=10)
    if frozen:
        next(iter(network.children())).requires_grad_(False)
    with counted_operations(network) as ours, FlopCounterMode(display=False) as theirs:
        network(images).sum().backward()
    assert ours.count == theirs.get_total_flops() > 0
    assert not any(module._forward_hooks for module in network.modules())


def test_the_peak_is_that_of_a_device() -> None:
    """A core does between a tenth of an operation per cycle and a thousand of them."""
    assert 1e8 < peak(torch.device("cpu")) / torch.get_num_threads() < 5e12
