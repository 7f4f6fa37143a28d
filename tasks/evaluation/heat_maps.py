"""Finds what the network looked at (Grad-CAM) in wrong and in right images of the test split."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnn.data.split_reader import SplitReader
from cnn.evaluation.grad_cam import grad_cam
from infra.records import Record
from tasks.evaluation.report import EvaluationReport, Example, examples
from tasks.reporting.drawing import images_at

MAPPED = 12  # images of each kind
LARGEST_MAP = 32  # pixels per side that are kept


class HeatMap(Record):
    """How much each part of an image raised the score of the predicted class."""

    example: Example

    rows: tuple[tuple[int, ...], ...]
    """From 0 (nothing, or lowered it) to 255 (the most in this image), by row and column of the network's map."""


def heat_maps(
    report: EvaluationReport, logits: Tensor, split: SplitReader, normalise: nn.Module, network: nn.Module
) -> tuple[HeatMap, ...]:
    """Returns maps of the most confidently wrong images, and of right ones of all classes; none without a useful map.

    Args:
        report: of the split.
        logits: float32 [N, classes], of the split.
        normalise: maps uint8 images to the network's input.
        network: on the same device, in evaluation mode, without averaging over mirror images.
    """
    right = _of_all_classes((logits.argmax(1) == split.labels).nonzero().squeeze(1), split.labels)
    shown = (*report.confidently_wrong[:MAPPED], *examples(logits, split.labels, right))
    device = next(network.parameters()).device
    images = normalise(images_at(split, [each.index for each in shown]).to(device))
    found = grad_cam(network, images, torch.tensor([each.predicted for each in shown]))
    if found is None:
        return ()
    if found.shape[-1] > LARGEST_MAP:
        found = F.adaptive_max_pool2d(found, LARGEST_MAP)
    levels = (255 * found).round().int().tolist()
    return tuple(HeatMap(example=each, rows=rows) for each, rows in zip(shown, levels, strict=True))


def _of_all_classes(images: Tensor, labels: Tensor) -> Tensor:
    """Returns up to `MAPPED` of the images, int64 [n]: the first of each class, then the second of each, and so on.

    If there are more classes, evenly spaced ones are taken.
    """
    by_class = images[labels[images].argsort(stable=True)]
    ordered = labels[by_class]
    number = torch.arange(len(ordered)) - torch.searchsorted(ordered, ordered)  # of an image within its class
    found = by_class[number.argsort(stable=True)][: max(MAPPED, int((number == 0).sum()))]
    return found[torch.linspace(0, len(found) - 1, min(MAPPED, len(found))).round().long()]
