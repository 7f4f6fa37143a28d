"""Maps of the plane, one per image, composed by multiplication; and the resampling of a batch through them.

A map takes a place in the new image to the place in the old image from which its pixel comes. Both are in the
coordinates of `torch.nn.functional.grid_sample`, x before y: -1 and 1 are the outer edges of the image. Maps are small
and are made on the host, as float64 N×3×3, or 1×3×3 for all images alike.
"""

from math import log
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

TRIES = 10
"""Draws of a random box until one fits into the image, as in torchvision."""

HALVE_FROM = 2.0
"""Pixels of the old image per pixel of the new one, along a side, from which an image is halved before it is resampled.

Of photographs shrunk by less, bilinear interpolation differs from the antialiased one by less than 1.7 of 255 on
average; shrunk by 2.24, it differs by 2.4, and after halving by 1.1.
"""

Size = tuple[int, int]
"""Height and width, in pixels."""


class Boxes(NamedTuple):
    """One box per image: int64 N, in pixels; `found` is false where no try has fitted."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    found: Tensor


def random_boxes(
    count: int,
    size: Size,
    *,
    area: tuple[float, float],
    aspect: tuple[float, float],
    generator: torch.Generator,
    largest: Size | None = None,
) -> Boxes:
    """Draws boxes inside images of one size, as torchvision's `RandomResizedCrop` and `RandomErasing` do.

    A box's share of the area is uniform, and so is the logarithm of its width divided by its height; of some tries, the
    first that fits counts, at a place that is uniform among those inside the image.

    Args:
        area: smallest and largest share.
        aspect: smallest and largest ratio.
        generator: on the host.
        largest: height and width of a box that fits; None: those of the image.
    """
    largest = largest or size
    tries = torch.rand(2, TRIES, count, dtype=torch.float64, generator=generator)
    areas = size[0] * size[1] * tries[0].mul(area[1] - area[0]).add(area[0])
    ratios = tries[1].mul(log(aspect[1] / aspect[0])).add(log(aspect[0])).exp()
    heights, widths = (areas / ratios).sqrt().round(), (areas * ratios).sqrt().round()
    fits = (heights >= 1) & (heights <= largest[0]) & (widths >= 1) & (widths <= largest[1])
    first = fits.byte().argmax(0, keepdim=True)
    height, width = (each.gather(0, first)[0] for each in (heights, widths))
    places = torch.rand(2, count, dtype=torch.float64, generator=generator)
    top, left = ((places[i] * (size[i] - each + 1)).floor() for i, each in enumerate((height, width)))
    return Boxes(top.long(), left.long(), height.long(), width.long(), fits.any(0))


def crop(boxes: Boxes, size: Size) -> Tensor:
    """Returns the map that fills the new image with a box of the old one, which has this size."""
    width, height = boxes.width / size[1], boxes.height / size[0]
    return _map(
        xx=torch.where(boxes.found, width, 1),
        x=torch.where(boxes.found, 2 * boxes.left / size[1] + width - 1, 0),
        yy=torch.where(boxes.found, height, 1),
        y=torch.where(boxes.found, 2 * boxes.top / size[0] + height - 1, 0),
    )


def mirror(chosen: Tensor) -> Tensor:
    """Returns the map that mirrors the chosen images (bool N) left-right."""
    return _map(xx=torch.where(chosen, -1, 1))


def rotate(degrees: Tensor, size: Size) -> Tensor:
    """Returns the map that turns images around their centre, anticlockwise."""
    sine, cosine = degrees.deg2rad().sin(), degrees.deg2rad().cos()
    height, width = size
    return _map(xx=cosine, xy=-sine * height / width, yx=sine * width / height, yy=cosine)


def shear_x(slope: Tensor, size: Size) -> Tensor:
    """Returns the map that moves rows to the left, in proportion to their distance from the upper edge."""
    by = slope * size[0] / size[1]
    return _map(xy=by, x=by)


def shear_y(slope: Tensor, size: Size) -> Tensor:
    """Returns the map that moves columns up, in proportion to their distance from the left edge."""
    by = slope * size[1] / size[0]
    return _map(yx=by, y=by)


def translate_x(pixels: Tensor, size: Size) -> Tensor:
    """Returns the map that moves images to the right by whole pixels, rounded towards zero."""
    return _map(x=pixels.trunc() * -2 / size[1])


def translate_y(pixels: Tensor, size: Size) -> Tensor:
    """Returns the map that moves images down by whole pixels, rounded towards zero."""
    return _map(y=pixels.trunc() * -2 / size[0])


def _map(
    *,
    xx: Tensor | float = 1.0,
    xy: Tensor | float = 0.0,
    x: Tensor | float = 0.0,
    yx: Tensor | float = 0.0,
    yy: Tensor | float = 1.0,
    y: Tensor | float = 0.0,
) -> Tensor:
    """Returns the map with old x = xx · x + xy · y + x and old y = yx · x + yy · y + y, as float64 N×3×3."""
    entries = [torch.as_tensor(each).double() for each in (xx, xy, x, yx, yy, y, 0, 0, 1)]
    return torch.stack(torch.broadcast_tensors(*entries), -1).view(-1, 3, 3)  # type: ignore[no-untyped-call]


def resample(images: Tensor, maps: Tensor, size: Size) -> Tensor:
    """Returns the images behind the maps, by bilinear interpolation; what lies outside the old image is black.

    An image that is shrunk much is halved first, by means of 2×2 pixels, once or more, so that no pixel is left out.

    Args:
        images: uint8 N×C×H×W.
        maps: float64 N×3×3, on the host.
        size: of the new images.

    Returns:
        float32 N×C×height×width of whole numbers 0 … 255.
    """
    device = images.device
    shrunk = (maps[:, :2, :2].det().abs() * images[0, 0].numel() / (size[0] * size[1])).sqrt()
    halvings = (shrunk / HALVE_FROM).log2().floor().add(1).clamp(min=0).long()
    counts, order = torch.bincount(halvings).tolist(), halvings.argsort(stable=True)
    # Not `affine_grid`, since a GPU may multiply matrices with fewer bits.
    theta = maps[order].float().to(device, non_blocking=True)[:, None, None]
    x, y = ((2 * torch.arange(length, device=device) + 1) / length - 1 for length in (size[1], size[0]))
    grid = theta[..., :2, 0] * x[:, None] + theta[..., :2, 1] * y[:, None, None] + theta[..., :2, 2]
    parts = images[order.to(device, non_blocking=True)].split_with_sizes(counts)
    halved = [_halved(part.float(), times) for times, part in enumerate(parts)]
    sampled = [
        F.grid_sample(part, part_grid, padding_mode="border", align_corners=False)
        for part, part_grid in zip(halved, grid.split_with_sizes(counts), strict=True)
    ]
    # Not the padding mode "zeros", which darkens the pixels next to an edge where an image is enlarged.
    new = torch.cat(sampled).mul_((grid.abs().amax(-1) <= 1)[:, None]).round_()
    return new[order.argsort().to(device, non_blocking=True)]


def _halved(images: Tensor, times: int) -> Tensor:
    height, width = (max(1, round(length / 2**times)) for length in images.shape[2:])
    return F.interpolate(images, (height, width), mode="area") if times and len(images) else images
