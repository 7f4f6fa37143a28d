"""Draws training images as the network gets them: the first step's, before and after augmentation."""

from collections.abc import Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from cnn.config.training import TrainConfig
from cnn.data.manifest import Manifest
from cnn.data.split_reader import SplitReader
from cnn.training.augment import augment, mix
from cnn.training.order import Order
from cnn.training.random_streams import generator
from tasks.reporting.drawing import Section, gallery, short

TITLE = "Training images, and below as the network got them in the first step"
SHOWN_LANES = 4
SHOWN = 32  # images, over all lanes


def augmented_sheet(config: TrainConfig, manifest: Manifest, train: SplitReader, device: torch.device) -> Image.Image:
    """Returns a picture with images of the first step's first lanes: as packed, and below as the network gets them.

    Both are before normalisation. Mixed images (mixup, cutmix) have the classes and shares of their target as title.

    Args:
        train: the training split.
        device: of the kind that trains; other kinds draw other random numbers.
    """
    lanes = range(min(config.lanes, SHOWN_LANES))
    shown, captions = [], []
    for images, augmented, targets in first_step(config, manifest, train, device, lanes):
        some = slice(SHOWN // len(lanes))
        shown.append((images[some], augmented[some]))
        captions += [_caption(target, manifest.classes) for target in targets[some]]
    above, below = map(torch.cat, zip(*shown, strict=True))
    return gallery([Section(TITLE, above, captions, below)])


def first_step(
    config: TrainConfig, manifest: Manifest, train: SplitReader, device: torch.device, lanes: range
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields per lane what `Trainer` trains on in its first step, without normalisation.

    Yields:
        The packed images and what is made of them, uint8 N×C×H×W, and the share of each class, float32 N×classes.
    """
    order = Order(config, manifest.splits["train"], lambda: train.labels).epoch(0, lanes)
    for place, lane in enumerate(lanes):
        images, labels = train.gather(order[0, place])
        random = generator(device, config.seed, "augment", 0, lane)
        augmented = augment(images.to(device), config.augment, random).float()
        # Mixing is a weighted mean, so it may come before normalisation as well as after it.
        mixed, targets = mix(augmented, labels.to(device), len(manifest.classes), config.augment, random)
        if targets.ndim == 1:
            targets = F.one_hot(targets, len(manifest.classes)).float()
        yield images, mixed.round().to(torch.uint8).cpu(), targets.cpu()


def _caption(target: Tensor, classes: Sequence[str]) -> str:
    """Returns the class, or both classes of a mixed image with their shares."""
    shares, found = (100 * target).round().int().sort(descending=True, stable=True)
    pairs = [(short(classes[label]), share) for share, label in zip(shares.tolist(), found.tolist(), strict=True)]
    if pairs[0][1] == 100:
        return pairs[0][0]
    return "\n".join(f"{name} {share}%" for name, share in pairs[:2])
