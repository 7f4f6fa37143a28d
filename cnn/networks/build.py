"""Builds a network by its name."""

from pkgutil import resolve_name

from torch import nn

from cnn.config.networks import find_network, is_own
from cnn.config.training import TrainConfig
from cnn.data.manifest import Manifest
from cnn.errors import InputError
from cnn.networks.own import own_network


def build(config: TrainConfig, manifest: Manifest) -> nn.Module:
    """Builds the network that a configuration names, for the images and classes of a dataset version."""
    return build_network(
        config, channels=manifest.channels, image_size=manifest.image_size, classes=len(manifest.classes)
    )


def build_network(config: TrainConfig, *, channels: int, image_size: int, classes: int) -> nn.Module:
    """Builds the network that a configuration names, with new random weights from torch's default generator.

    The network is for images C×H×W with C = `channels` and H = W = `image_size`, in pixels.

    Raises:
        InputError: the network cannot be built for such images, or lacks an option; or code of the user's raised an
            error.
    """
    network: nn.Module
    images = {"channels": channels, "image_size": image_size, "classes": classes}
    if is_own(config.model):
        own = own_network(config.model)
        network = own.build(config.network.model_dump(), **images)
        if not isinstance(network, nn.Module):
            raise InputError(f"{own.place}: it made a {type(network).__name__}, not a torch.nn.Module")
        network.train()  # it may have tried itself in evaluation mode
        return network
    entry = find_network(config.model)
    builder = resolve_name(entry.builder)  # imports the module only now: libraries are slow to import
    network = builder(config.network, **entry.arguments, **images)
    return network
