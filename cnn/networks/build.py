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
    """Builds the network that a configuration names, with new random weights from torch's default generator.

    The network is for images C×H×W with C = `channels` and H = W = `image_size`, in pixels.

    Raises:
        InputError: the images are too small for the network.
    """
    entry = NETWORKS[config.model]
    builder = resolve_name(entry.builder)  # imports the module only now: torchvision is slow to import
    network: nn.Module = builder(
        config.network, **entry.arguments, channels=channels, image_size=image_size, classes=classes
    )
    return network
