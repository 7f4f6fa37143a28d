"""Modules around a network: normalisation before it, and averaging of predictions over mirror images."""

from statistics import fmean

import torch
from torch import Tensor, nn

from cnn.config.training import TrainConfig
from cnn.data.manifest import Manifest


class Normalise(torch.nn.Module):
    """Maps uint8 images to float32, in channels_last order; those with this mean and std get zero mean, unit variance.

    Args:
        mean, std: per channel, on the scale 0 … 1; `normalisation` returns them.
    """

    scale: Tensor
    bias: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        means = torch.tensor(mean, dtype=torch.float64).view(1, -1, 1, 1)
        stds = torch.tensor(std, dtype=torch.float64).clamp_min(1e-6).view(1, -1, 1, 1)
        self.register_buffer("scale", (1 / (255 * stds)).float())
        self.register_buffer("bias", (-means / stds).float())

    def forward(self, images: Tensor) -> Tensor:
        """Maps uint8 N×C×H×W to float32 N×C×H×W."""
        return (images.float() * self.scale + self.bias).contiguous(memory_format=torch.channels_last)


def normalisation(config: TrainConfig, manifest: Manifest) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation by which a network's images are normalised, per channel, from 0 to 1.

    They are those of the images that its first weights were trained on, or else of the training split. Where the images
    have another number of channels (grey ones), each has the mean over the weights' channels.
    """
    if config.pretrained_mean is None or config.pretrained_std is None:
        return manifest.mean, manifest.std
    mean, std = (
        values if len(values) == manifest.channels else (fmean(values),) * manifest.channels
        for values in (config.pretrained_mean, config.pretrained_std)
    )
    return mean, std


class TestTimeFlip(torch.nn.Module):
    """A network that averages its logits over each image and its mirror image (Krizhevsky et al., 2012).

    Args:
        network: maps float N×C×H×W to logits N×classes.
    """

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Maps normalised float images N×C×H×W to logits N×classes."""
        return (self.network(images) + self.network(images.flip(-1))) / 2  # type: ignore[no-any-return]


def predictor(network: nn.Module, config: TrainConfig) -> nn.Module:
    """Returns the network as it predicts: with `test_flip` wrapped, so that it averages over mirror images."""
    return TestTimeFlip(network) if config.test_flip else network
