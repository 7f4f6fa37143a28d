"""Tries a network before a training exists: whether it takes the images, and whether lanes stay exact with it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedParameter

from cnn.config.networks import find_network, is_own
from cnn.config.training import TrainConfig
from cnn.errors import InputError
from cnn.networks.build import build_network
from cnn.networks.own import OwnNetwork, own_network

LARGER_SIZES = (8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 384, 512)
"""Image sizes in pixels, of which a refusal names the first that the network takes."""


def check_network(config: TrainConfig, *, channels: int, image_size: int, classes: int) -> nn.Module:
    """Builds a network; tries one of a library, or one's own, in a training step of two images.

    For a library's network the step runs on the device `meta`, which computes shapes only, so it takes no longer for
    large images. One's own may make tensors of its own in a step, so it is tried on the CPU, twice, and exported.

    Returns:
        The network, for further checks of shapes: one of a library has lost its values.

    Raises:
        InputError: the images do not suit the network, or a training of it could not be exact; the message says why.
            An error that the user's own code raised is named with its line.
    """

    def tried(size: int) -> nn.Module | str:
        """Returns the network, or why it cannot be computed."""
        try:
            network = build_network(config, channels=channels, image_size=size, classes=classes)
            if find_network(config.model).arguments:  # tests try the others, and `meta` would load torch.compile
                _try(network.to("meta"), config.model, channels, size, classes)
        except InputError:
            raise
        except Exception as error:  # libraries raise whatever the layer that cannot be computed raises
            return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".!")
        return network

    with torch.random.fork_rng(devices=[]):
        if is_own(config.model):
            network = build_network(config, channels=channels, image_size=image_size, classes=classes)
            _try_own(network, own_network(config.model), channels, image_size, classes)
            return network
        found = tried(image_size)
        if isinstance(found, nn.Module):
            return found
        larger = next((size for size in LARGER_SIZES if size > image_size and not isinstance(tried(size), str)), None)
    hint = f"set data.image_size={larger}" if larger else "choose another network"
    images = f"images of {channels}×{image_size}×{image_size}"
    raise InputError(f"{config.model} cannot be computed for {images}: {found}; {hint}")


def _try_own(network: nn.Module, own: OwnNetwork, channels: int, size: int, classes: int) -> None:
    """Runs a training step of two images on the CPU, checks that it can be repeated, and exports the network.

    Raises:
        InputError: lanes cannot train the network, it cannot be served, or its code raised an error.
    """
    if lazy := [key for key, each in network.named_parameters() if isinstance(each, UninitializedParameter)]:
        raise InputError(f"{own.name}: {lazy[0]} gets its shape from the first images; send some through it once")
    names: dict[int, str] = {}
    for key, tensor in network.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and (first := names.setdefault(id(tensor), key)) != key:
            raise InputError(f"{own.name} has one tensor as {first} and {key}; give each place a layer of its own")
    steps = []
    with own.blamed():
        for _ in range(2):
            torch.manual_seed(0)
            steps.append(_try(network, own.name, channels, size, classes, device="cpu"))
        images = torch.rand(3, channels, size, size).to(memory_format=torch.channels_last)
        with torch.inference_mode():
            served = network.eval()(images)
    if not torch.equal(*steps):
        raise InputError(
            f"{own.name} gives other outputs for the same images and seed; take random numbers from torch's "
            "default generator only, which lanes seed"
        )
    with own.blamed("torch.export cannot make a program of it, for any number of images"), torch.no_grad(), _quiet():
        program = torch.export.export(network, (images[:2],), dynamic_shapes=[{0: torch.export.Dim.AUTO}])
        exported = program.module()(images)
    if not torch.allclose(exported, served, rtol=1e-3, atol=1e-4):
        raise InputError(f"{own.name} gives other outputs as a program of torch.export, by which it is served")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps from the terminal what torch.export prints beside the error that it raises."""
    disabled = logging.root.manager.disable
    logging.disable()
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logging.disable(disabled)


def _try(network: nn.Module, name: str, channels: int, size: int, classes: int, device: str = "meta") -> Tensor:
    """Runs a training step of two images; returns the logits.

    Raises:
        InputError: lanes cannot train the network.
        Exception: a layer cannot be computed.
    """
    network = network.to(memory_format=torch.channels_last)
    averaged = {id(b) for layer in network.modules() if isinstance(layer, _BatchNorm) for b in layer.buffers()}
    before = {key: (id(buffer), buffer._version) for key, buffer in network.named_buffers()}
    logits = network(torch.rand(2, channels, size, size, device=device).to(memory_format=torch.channels_last))
    if not isinstance(logits, Tensor):
        raise InputError(f"{name} has {len(logits)} outputs in training, but a classifier has one")
    if logits.shape != (2, classes):
        shape = "×".join(map(str, logits.shape))
        raise InputError(f"{name} classifies no images: it returns {shape} numbers for 2 images of {classes} classes")
    for key, buffer in network.named_buffers():
        if (id(buffer), buffer._version) != before.get(key) and id(buffer) not in averaged:
            raise InputError(f"{name} changes {key} in training; lanes can share the averages of batch norm only")
    network.zero_grad()
    logits.sum().backward()  # type: ignore[no-untyped-call]
    for key, parameter in network.named_parameters():
        if parameter.requires_grad and parameter.grad is None:
            raise InputError(f"{name} does not use {key} in training, so it has no gradient")
    return logits.detach()
