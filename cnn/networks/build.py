"""Builds a network by its name."""

from pkgutil import resolve_name

from torch import nn

from cnn.config.networks import NETWORKS
from cnn.config.training import TrainConfig
from cnn.data.manifest import Manifest


def build(config: TrainConfig, manifest: Manifest) -> nn.Module:
    """Builds the network that a configuration names, for the images and classes of a dataset version."""
    return build_network(
        config, channels=manifest.channels, image_size=manifest.image_size, classes=len(manifest.classes)
    )


def build_network(config: TrainConfig, *, channels: int, image_size: int, classes: int) -> nn.Module:
    """Builds the network that a configuration names, with freshly drawn weights (seed torch first for the same ones).

    Args:
        config: names the network and its options.
        channels: channels of the images, C.
        image_size: height and width of the images in pixels, H = W.
        classes: number of classes.

    Raises:
        InputError: the images are too small for the network.
    """
    entry = NETWORKS[config.model]
    builder = resolve_name(entry.builder)  # loads its module only now: torchvision's takes long
    network: nn.Module = builder(
        config.network, **entry.arguments, channels=channels, image_size=image_size, classes=classes
    )
    return network
