"""The classic teaching network."""

import torch
from torch import nn

from cnn.config.networks import NotesOptions
from cnn.errors import InputError


def notes(options: NotesOptions, *, channels: int, image_size: int, classes: int) -> nn.Sequential:
    """Builds the network of the classic teaching notes: convolutions, pooling, fully connected layers, dropout.

    The first fully connected layer gets its input size from the images.

    Raises:
        InputError: the images are so small that a layer would leave no pixel.
    """
    depth = len(options.channels)
    kernels, strides = (each * (depth // len(each)) for each in (options.kernel_sizes, options.strides))
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
        # ReLU after pooling equals ReLU before it, since both keep the order of values, and it computes less.
        pooling = nn.MaxPool2d(options.pool_size, options.pool_stride)
        layers += [nn.Conv2d(inputs, filters, kernel, stride), pooling, nn.ReLU()]
        inputs, size = filters, after_pool
    layers.append(nn.Flatten())
    for units in options.hidden:
        layers += [nn.Dropout(options.dropout), nn.LazyLinear(units), nn.ReLU()]
    layers += [nn.Dropout(options.dropout), nn.LazyLinear(classes)]
    network = nn.Sequential(*layers)
    with torch.no_grad():
        network.eval()(torch.zeros(1, channels, image_size, image_size))  # sets the input size of the lazy layers
    return network.train()
