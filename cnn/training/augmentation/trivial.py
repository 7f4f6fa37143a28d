"""TrivialAugment: one operation of a list per image, with a uniform strength (Müller and Hutter, 2021)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cnn.training.augmentation import colour, geometry
from cnn.training.augmentation.geometry import Size

STRENGTHS = 31


class Operation(NamedTuple):
    """An operation, and the range of its strength; nothing is done without a map of the plane or change of colour."""

    weakest: float = 0.0
    strongest: float = 0.0
    signed: bool = False
    """Whether the strength is negative with probability one half."""

    move: Callable[[Tensor, Size], Tensor] | None = None
    change: Callable[[Tensor, Tensor], Tensor] | None = None
    around: float = 0.0
    """The strength that changes nothing, which is added."""


OPERATIONS = {
    "Identity": Operation(),
    "ShearX": Operation(0, 0.99, True, move=geometry.shear_x),
    "ShearY": Operation(0, 0.99, True, move=geometry.shear_y),
    "TranslateX": Operation(0, 32, True, move=geometry.translate_x),
    "TranslateY": Operation(0, 32, True, move=geometry.translate_y),
    "Rotate": Operation(0, 135, True, move=geometry.rotate),
    "Brightness": Operation(0, 0.99, True, change=colour.brightness, around=1),
    "Color": Operation(0, 0.99, True, change=colour.saturation, around=1),
    "Contrast": Operation(0, 0.99, True, change=colour.contrast, around=1),
    "Sharpness": Operation(0, 0.99, True, change=colour.sharpness, around=1),
    "Posterize": Operation(8, 2, change=colour.posterize),
    "Solarize": Operation(255, 0, change=colour.solarize),
    "AutoContrast": Operation(change=colour.autocontrast),
    "Equalize": Operation(change=colour.equalize),
}
"""The wide space of the paper, by torchvision's names."""


class Drawn(NamedTuple):
    """One operation per image, on the host."""

    operation: Tensor
    """int64 N: places in `OPERATIONS`."""

    strength: Tensor
    """float32 N."""


def draw(count: int, generator: torch.Generator) -> Drawn:
    """Draws an operation and one of 31 strengths per image, each with equal probability; `generator` is on the host."""
    operation = torch.randint(len(OPERATIONS), (count,), generator=generator)
    level = torch.randint(STRENGTHS, (count,), generator=generator) / (STRENGTHS - 1)
    negative = torch.rand(count, generator=generator) < 0.5
    table = torch.tensor([(o.weakest, o.strongest, o.signed, o.around) for o in OPERATIONS.values()])
    weakest, strongest, signed, around = table[operation].unbind(1)
    strength = weakest + (strongest - weakest) * level
    return Drawn(operation, around + torch.where(negative & signed.bool(), -strength, strength))


def maps(drawn: Drawn, size: Size) -> Tensor:
    """Returns the maps of the drawn operations on images of a size, float64 N×3×3; see `geometry`."""
    made = torch.eye(3, dtype=torch.float64).expand(len(drawn.operation), 3, 3)
    for place, operation in enumerate(OPERATIONS.values()):
        if operation.move:
            made = made @ operation.move(torch.where(drawn.operation == place, drawn.strength, 0), size)
    return made


def change_colours(images: Tensor, drawn: Drawn) -> Tensor:
    """Applies the drawn changes of colour to float32 N×C×H×W of whole numbers 0 … 255, each to its images only."""
    counts = torch.bincount(drawn.operation, minlength=len(OPERATIONS)).tolist()
    order = drawn.operation.argsort(stable=True)
    parts = images[order.to(images.device, non_blocking=True)].split_with_sizes(counts)
    strengths = drawn.strength[order].view(-1, 1, 1, 1).to(images.device, non_blocking=True).split_with_sizes(counts)
    changed = [
        operation.change(part, strength) if operation.change and len(part) else part
        for operation, part, strength in zip(OPERATIONS.values(), parts, strengths, strict=True)
    ]
    return torch.cat(changed)[order.argsort().to(images.device, non_blocking=True)]
