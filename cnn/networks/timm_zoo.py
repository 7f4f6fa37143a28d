"""Builds timm's networks. Downloads nothing."""

import math
from collections.abc import Sequence
from typing import Any

import timm
from torch import nn

from cnn.config.networks import TIMM, TimmOptions
from cnn.errors import InputError
from cnn.networks.torchvision_zoo import SMALL_IMAGE

STEM_POOLINGS = ("maxpool", "stem.pool", "features.pool0")
"""Names of the pooling in the stem: of ResNets, of pre-activation ResNets and NFNets, and of DenseNets."""

RATES = ("drop_rate", "drop_path_rate")


def timm_network(options: TimmOptions, *, name: str, channels: int, image_size: int, classes: int) -> nn.Module:
    """Builds one of timm's networks with new random weights; its parameters keep timm's names and shapes.

    The small stem keeps the first convolution's kernel and loses its stride, so that weights still fit.

    Args:
        name: one of `timm_names()`.

    Raises:
        InputError: the network lacks an option, or cuts images into patches and something would be left over.
    """
    published = timm.get_pretrained_cfg(name)
    fixed = published is not None and published.fixed_input_size
    arguments: dict[str, Any] = {rate: getattr(options, rate) for rate in RATES}
    if fixed:  # transformers get their size when they are built; other networks have no such argument
        arguments["img_size"] = image_size
    try:  # timm leaves out arguments that are None
        network = timm.create_model(name, pretrained=False, num_classes=classes, in_chans=channels, **arguments)
    except TypeError as error:
        if lacking := [rate for rate in RATES if f"'{rate}'" in str(error)]:
            raise InputError(f"{TIMM}{name} has no {lacking[0]}; leave out network.{lacking[0]}") from None
        raise
    convolutions = (layer for layer in network.modules() if isinstance(layer, nn.Conv2d))
    readers = [layer for layer in convolutions if layer.in_channels == channels]
    patch = max((layer.stride[0] for layer in readers if layer.kernel_size == layer.stride), default=1)
    if fixed and image_size % patch:
        fits = math.ceil(image_size / patch) * patch
        raise InputError(
            f"{TIMM}{name} cuts images into patches of {patch}×{patch} pixels, so it would not see the rest of "
            f"{image_size}×{image_size}; set data.image_size={fits}"
        )
    if options.stem == "small" or (options.stem == "auto" and image_size < SMALL_IMAGE):
        _shrink_no_image(network, readers)
    return network


def _shrink_no_image(network: nn.Module, readers: Sequence[nn.Conv2d]) -> None:
    """Sets the stride of the convolutions that read the image to 1; some stems have several, side by side."""
    if not any(layer.kernel_size[0] > layer.stride[0] > 1 for layer in readers):
        return
    for reader in readers:
        reader.stride = (1, 1)
    modules = dict(network.named_modules())
    for pooling in STEM_POOLINGS:
        if pooling in modules:
            network.set_submodule(pooling, nn.Identity())
