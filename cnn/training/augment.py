"""Augments whole batches, on their device, without Python code per image.

The distributions are those of torchvision's transforms: `RandomHorizontalFlip`, `RandomCrop` with zero padding,
`RandomErasing` of a fixed square that may reach over the edge (Cutout: DeVries and Taylor, 2017), `MixUp`, `CutMix`;
`RandomResizedCrop`, `RandomRotation`, `ColorJitter`, `RandomErasing` in black, `TrivialAugmentWide`.

All that moves pixels is composed into one map per image, so that a batch is resampled once: more than once would blur
it. A rotation after a crop therefore shows what lies beside the crop, and black only outside the whole image.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from cnn.config.training import AugmentConfig
from cnn.training.augmentation import geometry, trivial
from cnn.training.augmentation.colour import jitter

ERASED_AREA = (0.02, 0.33)
"""Smallest and largest share of an image that is erased: torchvision's values (Zhong et al., 2020: 0.02 to 0.4)."""

ERASED_ASPECT = (1 / 3.3, 1 / 0.3)
"""Smallest and largest ratio of the erased box's width and height."""


def augment(images: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Changes each image of a batch at random.

    Args:
        images: uint8 N×C×H×W.
        config: selects the changes and their sizes.
        generator: on the images' device; the result is a function of its seed. What the host must know is drawn there:
            for images on a GPU from the generator's initial seed.

    Returns:
        uint8 N×C×H×W, in new memory unless no change is on; H and W are `config.crop_size`, if it is set.
    """
    count, size = len(images), (images.shape[2], images.shape[3])
    host = _on_host(generator)
    policy = trivial.draw(count, host) if config.policy == "trivial" else None
    moved = policy or config.crop_area < 1 or config.rotation or (config.crop_size or size[0]) != size[0]
    coloured = config.brightness or config.contrast or config.saturation or config.hue
    if moved:
        new_size = (config.crop_size, config.crop_size) if config.crop_size else size
        maps = _maps(config, count, size, new_size, host)
        if policy:
            maps = maps @ trivial.maps(policy, new_size)
        images = geometry.resample(images, maps, new_size)
        if policy:
            images = trivial.change_colours(images, policy)
    else:
        if config.flip:
            images = _flip(images, generator)
        if config.shift:
            images = _shift(images, config.shift, generator)
    if coloured:
        images = jitter(images.float(), config, host)
    if moved or coloured:
        images = images.round().byte()
    if config.cutout:
        images = _cutout(images, config.cutout, generator)
    if config.erase:
        images = _erase(images, config.erase, host)
    return images


def _on_host(generator: torch.Generator) -> torch.Generator:
    """Returns a generator on the host with the same seed: to read from a GPU which image gets which change would take a
    wait for all that it still has to compute.
    """
    return generator if generator.device.type == "cpu" else torch.Generator().manual_seed(generator.initial_seed())


def _maps(
    config: AugmentConfig, count: int, size: geometry.Size, new_size: geometry.Size, host: torch.Generator
) -> Tensor:
    """Draws one map per image: crop, then mirror image, rotation and shift, of which the last comes first here."""
    maps = torch.eye(3, dtype=torch.float64).expand(count, 3, 3)
    if config.crop_area < 1:
        aspect = (1 / config.crop_aspect, config.crop_aspect)
        boxes = geometry.random_boxes(count, size, area=(config.crop_area, 1), aspect=aspect, generator=host)
        maps = maps @ geometry.crop(boxes, size)
    if config.flip:
        maps = maps @ geometry.mirror(torch.rand(count, generator=host) < 0.5)
    if config.rotation:
        degrees = config.rotation * (2 * torch.rand(count, dtype=torch.float64, generator=host) - 1)
        maps = maps @ geometry.rotate(degrees, new_size)
    if config.shift:
        right, down = torch.randint(-config.shift, config.shift + 1, (2, count), generator=host)
        maps = maps @ geometry.translate_x(right, new_size) @ geometry.translate_y(down, new_size)
    return maps


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
    return _blank(images, row, column, side, side)


def _erase(images: Tensor, probability: float, host: torch.Generator) -> Tensor:
    count, _, height, width = images.shape
    chosen = torch.rand(count, generator=host) < probability
    boxes = geometry.random_boxes(
        count, (height, width), area=ERASED_AREA, aspect=ERASED_ASPECT, largest=(height - 1, width - 1), generator=host
    )
    height_if = boxes.height * (chosen & boxes.found)
    places = torch.stack([boxes.top, boxes.left, height_if, boxes.width]).to(images.device, non_blocking=True)
    return _blank(images, *places.view(4, count, 1, 1, 1))


def _blank(images: Tensor, top: Tensor, left: Tensor, height: Tensor | int, width: Tensor | int) -> Tensor:
    """Returns the images with a black box in each; places and sizes are in pixels, int64 N×1×1×1."""
    rows = torch.arange(images.shape[2], device=images.device).view(1, 1, -1, 1)
    columns = torch.arange(images.shape[3], device=images.device).view(1, 1, 1, -1)
    inside = (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)
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
