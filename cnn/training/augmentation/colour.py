"""Changes of colour, of whole batches: float32 N×C×H×W of values 0 … 255, with 1 or 3 channels.

Each takes its strength per image, float32 N×1×1×1, and leaves its argument as it is. The values are those of
torchvision's functions, apart from the rounding to whole numbers, which torchvision does after each change.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from cnn.config.training import AugmentConfig


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Multiplies all values."""
    return (images * factor).clamp_(0, 255)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Multiplies the distance of all values from the image's mean grey."""
    return _from(_grey(images).mean((1, 2, 3), keepdim=True), images, factor)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Multiplies the distance of all values from their pixel's grey; a grey image stays as it is."""
    return _from(_grey(images), images, factor)


def hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turns the hue of coloured images by a share of the circle, keeping the saturation and value of HSV.

    The way back from hue to colours is that of "HSL and HSV", Wikipedia, "HSV to RGB alternative".
    """
    red, green, blue = images.unbind(1)
    low, high = images.aminmax(dim=1)
    chroma = high - low
    sixths = torch.where(
        high == red, green - blue, torch.where(high == green, blue - red + 2 * chroma, red - green + 4 * chroma)
    ) / chroma.clamp_min(1e-6)
    of_channel = torch.arange(5, 0, -2, device=images.device).view(3, 1, 1)
    place = (sixths[:, None] + (6 * turn + of_channel)).remainder_(6)
    share = torch.minimum(place, 4 - place).clamp_(0, 1)
    return high[:, None] - share.mul_(chroma[:, None])


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Multiplies the distance of all values from the smoothed image; pixels at the edge stay as they are."""
    if min(images.shape[2:]) <= 2:
        return images
    inner = images[..., 1:-1, 1:-1]
    smooth = (F.avg_pool2d(images, 3, stride=1) * (9 / 13) + inner * (4 / 13)).round_()
    return F.pad(_from(smooth, inner, factor) - inner, (1, 1, 1, 1)) + images


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keeps the highest bits of whole numbers; their number is rounded."""
    step = 2 ** (8 - bits.round())
    return (images / step).floor_() * step


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Inverts values from a threshold on."""
    return torch.where(images >= threshold, 255 - images, images)


def autocontrast(images: Tensor, _: Tensor) -> Tensor:
    """Stretches each channel to the whole range."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    stretched = (images - low) * (255 / (high - low).clamp_min(1))
    return torch.where(high > low, stretched, images)


def equalize(images: Tensor, _: Tensor) -> Tensor:
    """Maps the whole numbers of each channel such that all values become about as frequent, as Pillow does."""
    values = images.flatten(2).long()
    histogram = torch.zeros(*values.shape[:2], 256, dtype=torch.long, device=images.device)
    histogram.scatter_add_(2, values, torch.ones_like(values))
    last = histogram.gather(2, values.amax(2, keepdim=True))  # the count of the largest value
    step = (values.shape[2] - last) // 255
    below = histogram.cumsum(2) - histogram
    table = ((below + step // 2) // step.clamp_min(1)).clamp_(0, 255)
    equal = table.gather(2, values).view_as(images).to(images.dtype)
    return torch.where(step[..., None] > 0, equal, images)


def jitter(images: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Changes brightness, contrast, saturation and hue, in an order that is drawn once per batch.

    Args:
        generator: on the host; draws a factor per image and change, as torchvision's `ColorJitter` does.
    """
    changes = [
        (brightness, 1.0, config.brightness),
        (contrast, 1.0, config.contrast),
        (saturation, 1.0, config.saturation),
        (hue, 0.0, config.hue),
    ]
    changes = [each for each in changes if each[2]]
    if not changes:
        return images
    amounts = 2 * torch.rand(len(changes), len(images), 1, 1, 1, generator=generator) - 1
    for i in torch.randperm(len(changes), generator=generator).tolist():
        change, centre, most = changes[i]
        images = change(images, (centre + most * amounts[i]).to(images.device, non_blocking=True))
    return images


def _grey(images: Tensor) -> Tensor:
    """Returns N×1×H×W of whole numbers, by the weights of ITU-R BT.601, rounded down as in torchvision."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()[:, None]


def _from(other: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """Returns other + factor · (images - other), within 0 … 255."""
    return torch.lerp(other.expand_as(images), images, factor).clamp_(0, 255)
