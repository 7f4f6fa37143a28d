"""Augmentation and normalisation of whole batches, on their device. No per-sample Python.

The distributions are those of torchvision's per-sample transforms: `RandomHorizontalFlip`, `RandomCrop` with zero
padding, `RandomErasing` of a fixed square (Cutout: DeVries and Taylor, 2017).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from cnn.config import AugmentConfig


class Normalise(torch.nn.Module):
    """uint8 images to float32 with zero mean and unit variance over the training split, in channels_last order.

    Args:
        mean, std: per channel, on the scale 0 … 1.
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
        """uint8 N×C×H×W to float32 N×C×H×W."""
        return (images.float() * self.scale + self.bias).contiguous(memory_format=torch.channels_last)


def augment(images: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Change each image of a batch at random.

    Args:
        images: uint8 N×C×H×W.
        config: which changes, and how large.
        generator: on the images' device; the result is a function of its seed.

    Returns:
        uint8 N×C×H×W, new memory unless nothing is switched on.
    """
    if config.flip:
        images = _flip(images, generator)
    if config.shift:
        images = _shift(images, config.shift, generator)
    if config.cutout:
        images = _cutout(images, config.cutout, generator)
    return images


def _flip(images: Tensor, generator: torch.Generator) -> Tensor:
    chosen = torch.rand(len(images), 1, 1, 1, device=images.device, generator=generator) < 0.5
    return torch.where(chosen, images.flip(-1), images)


def _shift(images: Tensor, distance: int, generator: torch.Generator) -> Tensor:
    count, _, height, width = images.shape
    padded = F.pad(images, (distance,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: N, C, 2·distance + 1, 2·distance + 1, H, W
    top, left = torch.randint(2 * distance + 1, (2, count), device=images.device, generator=generator)
    return windows[torch.arange(count, device=images.device), :, top, left]


def _cutout(images: Tensor, side: int, generator: torch.Generator) -> Tensor:
    count, _, height, width = images.shape
    device = images.device
    # The centre is uniform over the image, so that the square may reach over the edge, as in the paper.
    row = torch.randint(height, (count, 1, 1, 1), device=device, generator=generator) - side // 2
    column = torch.randint(width, (count, 1, 1, 1), device=device, generator=generator) - side // 2
    rows = torch.arange(height, device=device).view(1, 1, -1, 1)
    columns = torch.arange(width, device=device).view(1, 1, 1, -1)
    inside = (rows >= row) & (rows < row + side) & (columns >= column) & (columns < column + side)
    return images.masked_fill(inside, 0)
