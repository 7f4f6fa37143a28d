"""Augments whole batches, on their device, without Python code per image.

The distributions are those of torchvision's transforms: `RandomHorizontalFlip`, `RandomCrop` with zero padding,
`RandomErasing` of a fixed square that may reach over the edge (Cutout: DeVries and Taylor, 2017), `MixUp`, `CutMix`.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from cnn.config.training import AugmentConfig


def augment(images: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Changes each image of a batch at random.

    Args:
        images: uint8 N×C×H×W.
        config: selects the changes and their sizes.
        generator: on the images' device; the result is a function of its seed.

    Returns:
        uint8 N×C×H×W, in new memory unless no change is on.
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
    # The centre is uniform over the image, so the square may reach over the edge, as in the paper.
    row = torch.randint(height, (count, 1, 1, 1), device=device, generator=generator) - side // 2
    column = torch.randint(width, (count, 1, 1, 1), device=device, generator=generator) - side // 2
    rows = torch.arange(height, device=device).view(1, 1, -1, 1)
    columns = torch.arange(width, device=device).view(1, 1, 1, -1)
    inside = (rows >= row) & (rows < row + side) & (columns >= column) & (columns < column + side)
    return images.masked_fill(inside, 0)


def mix(
    images: Tensor, labels: Tensor, classes: int, config: AugmentConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mixes each image of a batch, and its label, with another: mixup (Zhang et al., 2018), cutmix (Yun et al., 2019).

    The partners are a random permutation of the batch, and all pairs share one Beta-distributed mixing ratio and box.

    Args:
        images: float N×C×H×W, normalised.
        labels: int64 N.
        classes: number of classes.
        config: says which is on; with both, each batch picks one of them with equal probability.
        generator: on the images' device; the result is a function of its seed.

    Returns:
        Images in the same memory format, and targets float32 N×classes, whose rows have the sum 1. If neither is on,
        the unchanged images and labels.
    """
    if not (config.mixup or config.cutmix):
        return images, labels
    # Random values stay on the device, and no branch depends on them: reading them would make the host wait for a GPU.
    device = images.device
    cutmix_chance = 0.5 if config.mixup and config.cutmix else float(config.cutmix > 0)
    cuts = torch.rand((), device=device, generator=generator) < cutmix_chance
    alpha = torch.where(cuts, config.cutmix, config.mixup).double().expand(2)
    # Two Gamma variates give a Beta variate; in float64, since small alphas give values below float32's smallest.
    gammas = torch._standard_gamma(alpha, generator=generator)
    theirs = gammas[0] / gammas.sum()
    rows, columns = (_interval(size, theirs.sqrt(), generator) for size in images.shape[2:])
    # The partner's share of each pixel, H×W: the same everywhere (mixup), or one in a box and zero outside (cutmix).
    share = torch.where(cuts, (rows[:, None] & columns).float(), theirs.float())
    partner = torch.randperm(len(images), device=device, generator=generator)
    targets = (labels[:, None] == torch.arange(classes, device=device)).float()
    # The mean is the box's true share of the area, even if the edge cuts it.
    return torch.lerp(images, images[partner], share.to(images.dtype)), targets.lerp(targets[partner], share.mean())


def _interval(size: int, share: Tensor, generator: torch.Generator) -> Tensor:
    """Returns a mask of `size` pixels: an interval with this share of them, around a random pixel."""
    half = (share * size / 2).floor()
    centre = torch.randint(size, (), device=share.device, generator=generator)
    pixels = torch.arange(size, device=share.device)
    return (pixels >= centre - half) & (pixels < centre + half)
