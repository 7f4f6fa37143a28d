"""Refuses, before servers start, a configuration that cannot succeed on images of a size and number that are known."""

from cnn.config.training import IMAGENET
from cnn.networks.published import published_weights
from cnn.training.trainer import check_trainable
from infra.sources.entries import catalogued
from tasks.config.launchers import check_installed
from tasks.config.run import RunConfig
from tasks.training.pretrained import check_exists


def check_early(config: RunConfig) -> None:
    """Checks launcher and published weights; of a catalogue's data set or a given `data.image_size`, network and floor.

    What depends on other data is checked once they are packed.

    Raises:
        InputError: the network cannot be trained on such images as configured; or nobody has published weights of it.
        UsageError: the launcher's package is not installed; the file of weights does not exist; or too few test images
            for the floor.
    """
    check_installed(config.launcher)
    if config.pretrained == IMAGENET:
        published_weights(config.model)
    elif config.pretrained:
        check_exists(config.pretrained)
    entry = catalogued(config.dataset)
    if image_size := config.data.image_size or (entry and entry.image_size):
        channels = config.data.channels or (entry and entry.channels) or 3
        check_trainable(config, channels=channels, image_size=image_size, classes=2)
    if entry and entry.test_images and config.promotes:
        config.gate.check_floor(min(entry.test_images, config.data.limit or entry.test_images))
