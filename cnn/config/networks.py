"""The table of networks, the options of each network, and the lookup of a name."""

import difflib
import re
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
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
    """Filters of the first convolution; the two stages after it have two and four times as many."""

    stem_width: int | None = Field(None, ge=4, le=512)
    """Filters of the first convolution, if not `width`. Half as many save a tenth of the time on small grey images."""

    stem_kernel: Literal[2, 3] = 3
    """Height and width of the first convolution's kernel, in pixels; 2 is faster."""

    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of dropping a feature before the linear layer."""


class TorchvisionOptions(Config):
    """Options of torchvision's networks (`network.*`)."""

    stem: Literal["auto", "small", "original"] = "auto"
    """First layers: `original` shrinks the image immediately; `small` starts with a 3×3 convolution of stride 1, and
    drops the first pooling of a ResNet or DenseNet; `auto` is `small` for images under 64 pixels. Transformers have
    only `original`."""


class TimmOptions(Config):
    """Options of timm's networks (`network.*`)."""

    stem: Literal["auto", "small", "original"] = "auto"
    """First layers: `original` shrinks the image immediately; `small` has stride 1 in the convolution that reads the
    image, and drops the pooling of the stem; `auto` is `small` for images under 64 pixels. Networks that cut the image
    into patches have only `original`."""

    drop_rate: float | None = Field(None, ge=0, lt=1)
    """Probability of dropping a feature before the last layer. Unset: the network's own, mostly 0."""

    drop_path_rate: float | None = Field(None, ge=0, lt=1)
    """Probability of skipping the last residual block, for each image; it falls linearly to 0 at the first block
    (stochastic depth). Unset: the network's own, mostly 0."""


class OwnOptions(Config, extra="allow"):
    """Options of a network of one's own (`network.*`): the other arguments of its class or function, as JSON values.

    They are checked where the network's module can be imported (`OwnNetwork.resolved` in `cnn/networks/own.py`).
    """


TORCHVISION_NETWORKS = tuple(
    """
    alexnet
    convnext_base convnext_large convnext_small convnext_tiny
    densenet121 densenet161 densenet169 densenet201
    efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b5 efficientnet_b6
    efficientnet_b7 efficientnet_v2_l efficientnet_v2_m efficientnet_v2_s
    maxvit_t
    mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3
    mobilenet_v2 mobilenet_v3_large mobilenet_v3_small
    regnet_x_16gf regnet_x_1_6gf regnet_x_32gf regnet_x_3_2gf regnet_x_400mf regnet_x_800mf regnet_x_8gf
    regnet_y_128gf regnet_y_16gf regnet_y_1_6gf regnet_y_32gf regnet_y_3_2gf regnet_y_400mf regnet_y_800mf
    regnet_y_8gf
    resnet101 resnet152 resnet18 resnet34 resnet50
    resnext101_32x8d resnext101_64x4d resnext50_32x4d
    shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0
    squeezenet1_0 squeezenet1_1
    swin_b swin_s swin_t swin_v2_b swin_v2_s swin_v2_t
    vgg11 vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn
    vit_b_16 vit_b_32 vit_h_14 vit_l_16 vit_l_32
    wide_resnet101_2 wide_resnet50_2
    """.split()  # noqa: SIM905  as quoted words, each would take a line
)
"""Names that `torchvision.models.get_model` accepts: all networks that classify images, but those in `AUXILIARY`."""

AUXILIARY = ("googlenet", "inception_v3")
"""Networks of torchvision with more than one output in training."""

TIMM = "timm/"
"""What a name of timm's begins with."""

OWN_NAME = r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*"
"""Pattern of the name of a network of one's own, `package.module:NAME`."""


class Network(NamedTuple):
    """The options and the builder of a network.

    The builder is called with an instance of the options and the keywords `channels`, `image_size`, `classes` and
    `arguments`. It returns a network that maps normalised float images N×C×H×W to logits N×classes.
    """

    options: type[Config]
    builder: str
    """As `module:name`, since this module must not import torch."""

    arguments: Mapping[str, str] = MappingProxyType({})
    """Of a library's network, its `name` there."""


def _of_timm(name: str) -> Network:
    return Network(TimmOptions, "cnn.networks.timm_zoo:timm_network", {"name": name})


NETWORKS: Mapping[str, Network] = MappingProxyType(
    {
        "notes": Network(NotesOptions, "cnn.networks.notes:notes"),
        "convoy9": Network(Convoy9Options, "cnn.networks.convoy9:Convoy9"),
        "efficientnet_lite0": _of_timm("tf_efficientnet_lite0"),
        **{
            name: Network(TorchvisionOptions, "cnn.networks.torchvision_zoo:torchvision_network", {"name": name})
            for name in TORCHVISION_NETWORKS
        },
    }
)
"""The networks by name, except timm's. A new network needs options and an entry here, and a builder in its own file."""


def find_network(name: str) -> Network:
    """Returns the options and the builder of a network: an entry of the table, `timm/NAME` or `package.module:NAME`.

    Of a network of one's own only the form of the name is checked.

    Raises:
        ValueError: there is no such network; the message names the nearest.
    """
    if name in NETWORKS:
        return NETWORKS[name]
    if is_own(name):
        if re.fullmatch(OWN_NAME, name):
            return Network(OwnOptions, name)
        file, _, attribute = name.partition(":")
        meant = f"{file.removesuffix('.py').strip('./').replace('/', '.')}:{attribute}"
        hint = f"; did you mean {meant!r}?" if re.fullmatch(OWN_NAME, meant) else ""
        raise ValueError(f"{name!r} names no network; a network of your own is package.module:NAME{hint}")
    theirs = name.removeprefix(TIMM)
    if name != theirs and theirs in timm_names():
        return _of_timm(theirs)
    if name in AUXILIARY:
        raise ValueError(f"{name} has more than one output in training, so it cannot be trained here")
    if name in timm_names():
        near = [TIMM + name]
    else:
        known = NETWORKS if name == theirs else [TIMM + each for each in timm_names()]
        near = difflib.get_close_matches(name, known, n=1)
    others = ", ".join(each for each in NETWORKS if each not in TORCHVISION_NETWORKS)
    all_names = (
        f"choose {others}, one of torchvision's, {TIMM}NAME (timm.list_models() in Python lists them), or "
        "package.module:NAME of your own"
    )
    hint = f"did you mean {near[0]!r}?" if near else all_names
    if re.fullmatch(r"\w+(\.\w+)+", name):
        hint = "a network of your own is package.module:NAME"
    raise ValueError(f"unknown network {name!r}; {hint}")


def is_own(name: object) -> bool:
    """Checks whether a value stands for a network of one's own, `package.module:NAME`."""
    return isinstance(name, str) and ":" in name and not name.startswith(TIMM)


def is_network(name: object) -> bool:
    """Checks whether `find_network` finds a value."""
    if not isinstance(name, str):
        return False
    of_timm = name.startswith(TIMM) and name[len(TIMM) :] in timm_names()
    return name in NETWORKS or of_timm or bool(re.fullmatch(OWN_NAME, name))


@cache
def timm_names() -> tuple[str, ...]:
    """Returns the names of timm's networks in order, read from its source: its import would load torch."""
    spec = find_spec("timm")
    files = Path(spec.origin).parent.glob("models/*.py") if spec and spec.origin else ()
    marked = re.compile(r"^@register_model\ndef (\w+)\(", re.MULTILINE)
    return tuple(sorted(name for file in files for name in marked.findall(file.read_text(encoding="utf-8"))))
