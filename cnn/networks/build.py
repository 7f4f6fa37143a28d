"""The networks, by name. Each takes normalised float images N×C×H×W and gives logits N×classes."""

import torch
from torch import Tensor, nn

from cnn.config.networks import Convoy9Options, NotesOptions, TorchvisionOptions
from cnn.config.training import TrainConfig
from cnn.data.manifest import Manifest
from cnn.errors import InputError


def build(config: TrainConfig, manifest: Manifest) -> nn.Module:
    """Builds the network that a configuration names, for the images and classes of a dataset version."""
    return build_network(
        config, channels=manifest.channels, image_size=manifest.image_size, classes=len(manifest.classes)
    )


def build_network(config: TrainConfig, *, channels: int, image_size: int, classes: int) -> nn.Module:
    """Build the network that a configuration names, with freshly drawn weights (seed torch first for the same ones).

    Args:
        config: names the network and its options.
        channels: channels of the images, C.
        image_size: height and width of the images in pixels, H = W.
        classes: number of classes.

    Raises:
        InputError: the images are too small for the network.
    """
    match config.network:
        case NotesOptions() as options:
            return notes(options, channels=channels, image_size=image_size, classes=classes)
        case Convoy9Options() as options:
            return Convoy9(options, channels=channels, image_size=image_size, classes=classes)
        case TorchvisionOptions() as options:
            from cnn.networks.torchvision_zoo import torchvision_network  # only here: its import takes long

            return torchvision_network(config.model, options, channels=channels, image_size=image_size, classes=classes)
        case other:
            raise TypeError(f"no network has {type(other).__name__}")


def notes(options: NotesOptions, *, channels: int, image_size: int, classes: int) -> nn.Sequential:
    """The network of the classic teaching notes: convolutions, pooling, flatten, fully connected layers, dropout.

    Each convolution takes as many channels as the one before gives. The first fully connected layer finds its
    input size by itself, from the images.

    Raises:
        InputError: a layer would leave no pixel of an image of this size.
    """
    depth = len(options.channels)
    kernels, strides = _for_each(options.kernel_sizes, depth), _for_each(options.strides, depth)
    layers: list[nn.Module] = []
    inputs, size = channels, image_size
    for number, (filters, kernel, stride) in enumerate(zip(options.channels, kernels, strides, strict=True), 1):
        after_conv = (size - kernel) // stride + 1
        after_pool = (after_conv - options.pool_size) // options.pool_stride + 1
        if min(after_conv, after_pool) < 1:
            raise InputError(
                f"images of {image_size}×{image_size} pixels are too small for notes: nothing is left after layer "
                f"{number}; give larger images (data.image_size), fewer network.channels, or smaller windows"
            )
        # ReLU after pooling equals ReLU before it, since both keep the order of values, and has less to do.
        pooling = nn.MaxPool2d(options.pool_size, options.pool_stride)
        layers += [nn.Conv2d(inputs, filters, kernel, stride), pooling, nn.ReLU()]
        inputs, size = filters, after_pool
    layers.append(nn.Flatten())
    for units in options.hidden:
        layers += [nn.Dropout(options.dropout), nn.LazyLinear(units), nn.ReLU()]
    layers += [nn.Dropout(options.dropout), nn.LazyLinear(classes)]
    network = nn.Sequential(*layers)
    with torch.no_grad():
        network.eval()(torch.zeros(1, channels, image_size, image_size))  # gives the lazy layers their input size
    return network.train()


def _for_each(values: tuple[int, ...], depth: int) -> tuple[int, ...]:
    return values if len(values) == depth else values * depth


class Convoy9(nn.Module):
    """Eight convolutions with batch norm, two of the stages residual, global max pooling and a linear layer.

    The plan is that of the nine-layer residual network of Page, "How to train your ResNet" (2018), with the pooling
    moved forward: full-resolution layers cost a CPU the most time for the least accuracy. Works for images of any
    size: what has become a single pixel is not pooled further.
    """

    def __init__(self, options: Convoy9Options, *, channels: int, image_size: int, classes: int) -> None:
        super().__init__()
        width = options.width
        pool = [image_size >> stage >= 2 for stage in range(3)]
        self.stem = _conv(channels, width, pool=pool[0])
        self.stage1 = nn.Sequential(_conv(width, 2 * width, pool=pool[1]), _Residual(2 * width))
        self.stage2 = nn.Sequential(_conv(2 * width, 4 * width, pool=pool[2]), _Residual(4 * width))
        self.head = _conv(4 * width, 4 * width)
        self.dropout = nn.Dropout(options.dropout)
        self.linear = nn.Linear(4 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised float images N×C×H×W to logits N×classes."""
        maps: Tensor = self.head(self.stage2(self.stage1(self.stem(images))))
        logits: Tensor = self.linear(self.dropout(maps.amax(dim=(2, 3))))
        return logits


def _conv(inputs: int, outputs: int, *, pool: bool = False) -> nn.Sequential:
    """3×3 convolution, 2×2 max pooling if asked for, batch norm, ReLU."""
    pooling = [nn.MaxPool2d(2)] if pool else []
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(convolution, *pooling, nn.BatchNorm2d(outputs), nn.ReLU())


class _Residual(nn.Module):
    """Two convolutions beside an identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(channels, channels), _conv(channels, channels))

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.body(maps)  # type: ignore[no-any-return]
