"""Builds torchvision's networks, with a first convolution that suits the images. Downloads nothing."""

from functools import partial
from typing import Any

from torch import nn
from torchvision import models
from torchvision.models import (
    AlexNet,
    ConvNeXt,
    DenseNet,
    MaxVit,
    ResNet,
    ShuffleNetV2,
    SqueezeNet,
    SwinTransformer,
    VisionTransformer,
)

from cnn.config.networks import TorchvisionOptions
from cnn.errors import InputError

SMALL_IMAGE = 64  # pixels; below, `stem=auto` is `small`

TRANSFORMERS = (MaxVit, SwinTransformer, VisionTransformer)

INITIALISERS = {
    AlexNet: None,
    ConvNeXt: partial(nn.init.trunc_normal_, std=0.02),
    DenseNet: nn.init.kaiming_normal_,
    MaxVit: partial(nn.init.normal_, std=0.02),
    ShuffleNetV2: None,
    SqueezeNet: nn.init.kaiming_uniform_,
    SwinTransformer: None,
    VisionTransformer: lambda weight: nn.init.trunc_normal_(weight, std=weight[0].numel() ** -0.5),
}
"""How torchvision draws first convolutions that differ from the usual; None is as torch.nn.Conv2d does."""


def torchvision_network(
    options: TorchvisionOptions, *, name: str, channels: int, image_size: int, classes: int
) -> nn.Module:
    """Builds one of torchvision's networks with new random weights; its parameters keep torchvision's names.

    The small stem is that of He et al., "Deep Residual Learning" (2016), section 4.2, for CIFAR-10.

    Args:
        name: one of `TORCHVISION_NETWORKS`.

    Raises:
        InputError: the images are too small for a ConvNeXt, which shrinks them without padding; or a small stem for a
            transformer.
    """
    sizes: dict[str, dict[str, Any]] = {
        "vit": {"image_size": image_size},
        "maxvit": {"input_size": (image_size, image_size)},
    }
    network: nn.Module = models.get_model(  # type: ignore[attr-defined]
        name, weights=None, num_classes=classes, **sizes.get(name.partition("_")[0], {})
    )
    small = options.stem == "small" or (options.stem == "auto" and image_size < SMALL_IMAGE)
    if isinstance(network, TRANSFORMERS):
        if options.stem == "small":
            raise InputError(f"{name} is a transformer, which has no small stem; leave out network.stem")
        small = False
    if isinstance(network, ConvNeXt) and image_size < (smallest := 8 if small else 32):
        raise InputError(
            f"images of {image_size}×{image_size} pixels are too small for {name}, which needs {smallest}×{smallest}; "
            "give larger images (data.image_size)" + ("" if small else " or set network.stem=small")
        )
    where, first = next((n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d))
    if small or channels != first.in_channels:
        network.set_submodule(where, _first_convolution(network, first, channels, small))
    if small and isinstance(network, ResNet | DenseNet):
        network.set_submodule("maxpool" if isinstance(network, ResNet) else "features.pool0", nn.Identity())
    return network


def _first_convolution(network: nn.Module, original: nn.Conv2d, channels: int, small: bool) -> nn.Conv2d:
    """Builds another first convolution, with the same distribution of weights as the other convolutions."""
    kernel, stride, padding = (3, 1, 1) if small else (original.kernel_size, original.stride, original.padding)
    bias = original.bias is not None
    convolution = nn.Conv2d(channels, original.out_channels, kernel, stride, padding, bias=bias)  # type: ignore[arg-type]
    usual = partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu")
    if draw := INITIALISERS.get(type(network), usual):
        draw(convolution.weight)
        if convolution.bias is not None:
            nn.init.zeros_(convolution.bias)
    return convolution
