"""The table of networks, and the options of each network."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

from pydantic import Field, model_validator

from cnn.config.base import Config


class NotesOptions(Config):
    """Options of `notes`, the classic teaching network (`network.*`)."""

    channels: tuple[int, ...] = (32, 64)
    """Output channels (filters) of each convolution; one convolution per entry."""

    kernel_sizes: tuple[int, ...] = (3,)
    """Kernel size of each convolution, in pixels; a single entry is used for all."""

    strides: tuple[int, ...] = (1,)
    """Stride of each convolution, in pixels; a single entry is used for all."""

    pool_size: int = Field(2, ge=1)
    """Window of the max pooling after each convolution, in pixels; 1 is no pooling."""

    pool_stride: int = Field(2, ge=1)
    """Stride of the max pooling, in pixels."""

    hidden: tuple[int, ...] = (128,)
    """Sizes of the fully connected layers before the last one; may be empty."""

    dropout: float = Field(0.25, ge=0, lt=1)
    """Probability of dropping a value before each fully connected layer."""

    @model_validator(mode="after")
    def _check_entries(self) -> "NotesOptions":
        for key in ("channels", "kernel_sizes", "strides", "hidden"):
            if any(value < 1 for value in getattr(self, key)):
                raise ValueError(f"{key} must be positive")
        if not self.channels:
            raise ValueError("channels needs at least one entry")
        for key in ("kernel_sizes", "strides"):
            if len(getattr(self, key)) not in (1, len(self.channels)):
                raise ValueError(f"{key} needs one entry, or {len(self.channels)}, one per convolution")
        return self


class Convoy9Options(Config):
    """Options of `convoy9`, eight convolutions with batch norm and a linear layer (`network.*`)."""

    width: int = Field(32, ge=4, le=512, multiple_of=4)
    """Filters of the first convolution; later stages have two, four and eight times as many."""

    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of dropping a feature before the linear layer."""


class TorchvisionOptions(Config):
    """Options of torchvision's networks (`network.*`)."""

    stem: Literal["auto", "small", "original"] = "auto"
    """First layers: `original` shrinks the image immediately; `small` starts with a 3×3 convolution of stride 1, and
    drops the first pooling of a ResNet; `auto` is `small` for images under 64 pixels."""


TORCHVISION_NETWORKS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnext50_32x4d",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "convnext_tiny",
    "regnet_y_400mf",
    "shufflenet_v2_x1_0",
)
"""Names that `torchvision.models.get_model` accepts."""


class Network(NamedTuple):
    """The options and the builder of a network.

    The builder is called with an instance of the options and the keywords `channels`, `image_size`, `classes` and
    `arguments`. It returns a network that maps normalised float images N×C×H×W to logits N×classes.
    """

    options: type[Config]
    builder: str
    """As `module:name`, since this module must not import torch."""

    arguments: Mapping[str, str] = MappingProxyType({})


NETWORKS: Mapping[str, Network] = MappingProxyType(
    {
        "notes": Network(NotesOptions, "cnn.networks.notes:notes"),
        "convoy9": Network(Convoy9Options, "cnn.networks.convoy9:Convoy9"),
        **{
            name: Network(TorchvisionOptions, "cnn.networks.torchvision_zoo:torchvision_network", {"name": name})
            for name in TORCHVISION_NETWORKS
        },
    }
)
"""The networks by name. A new network needs options and an entry here, and a builder in a file of its own."""
