"""A network of your own; `convoy train --model my_network:SmallNet --set network.width=32` trains it."""

from itertools import pairwise

from torch import Tensor, nn


class SmallNet(nn.Module):
    """Three convolutions with batch norm, the mean over the image, and a linear layer.

    Args:
        channels: channels of the images, 1 or 3.
        image_size: their height and width in pixels.
        classes: number of classes.
        width: filters of the first convolution; each further one has twice as many. The key `network.width`.
    """

    def __init__(self, *, channels: int, image_size: int, classes: int, width: int = 16) -> None:
        super().__init__()
        sizes = [channels, width, 2 * width, 4 * width]
        blocks: list[nn.Module] = []
        for number, (before, after) in enumerate(pairwise(sizes)):
            blocks += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            if image_size >> number >= 8:  # smaller images are not made smaller again
                blocks.append(nn.MaxPool2d(2))
        self.body = nn.Sequential(*blocks)
        self.head = nn.Linear(sizes[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Maps normalised float images N×C×H×W to logits N×classes."""
        logits: Tensor = self.head(self.body(images).mean((2, 3)))
        return logits
