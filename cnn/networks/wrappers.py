"""Modules around a network: normalisation before it, and averaging of predictions over mirror images."""

from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


class TestTimeAverage(torch.nn.Module):
    """A network that averages its logits over each image and copies of it.

    Args:
        network: maps float N×C×H×W to logits N×classes.
        flip: adds the mirror image (Krizhevsky et al., 2012).
        shift: adds two copies, moved along the diagonal by so many pixels, if not 0: one down and to the right, the
            other up and to the left, mirrored with `flip`. What moves in at an edge repeats that edge. (Jordan, "94% on
            CIFAR-10 in 3.29 seconds", 2024, takes both of both.)
    """

    def __init__(self, network: torch.nn.Module, *, flip: bool, shift: int) -> None:
        super().__init__()
        self.network, self.flip, self.shift = network, flip, shift

    def forward(self, images: Tensor) -> Tensor:
        """Maps normalised float images N×C×H×W to logits N×classes."""
        copies = [images, images.flip(-1)] if self.flip else [images]
        if by := self.shift:
            padded = F.pad(images, (by, by, by, by), mode="replicate")
            right, left = padded[..., : -2 * by, : -2 * by], padded[..., 2 * by :, 2 * by :]
            moved = right, left.flip(-1) if self.flip else left
            copies += [each.contiguous(memory_format=torch.channels_last) for each in moved]
        first, *others = (self.network(each) for each in copies)
        return sum(others, first) / len(copies)  # type: ignore[no-any-return]


def predictor(network: nn.Module, config: TrainConfig) -> nn.Module:
    """Returns the network as it predicts: averaging over copies of each image, with `test_flip` or `test_shift`."""
    if not (config.test_flip or config.test_shift):
        return network
    return TestTimeAverage(network, flip=config.test_flip, shift=config.test_shift)
