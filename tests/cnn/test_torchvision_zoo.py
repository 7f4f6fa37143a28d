"""torchvision's networks by name, for images of any size."""

from collections.abc import Iterator

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torchvision import models

from cnn.config.networks import AUXILIARY, TORCHVISION_NETWORKS
from cnn.config.training import TrainConfig
from cnn.errors import InputError
from cnn.networks.build import build_network
from cnn.networks.trial import check_network
from cnn.serving.classifier import ServedClassifier
from tests.cnn.conftest import check_export_takes_any_number

FAMILIES = (
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "resnet18",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
    "swin_v2_t",
    "vgg11_bn",
    "vit_b_32",
)
"""The smallest network of each family, but for MaxViT, which needs 224 pixels."""

TRANSFORMERS = tuple(name for name in TORCHVISION_NETWORKS if name.startswith(("swin", "vit", "maxvit")))


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """As in training."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def network(model: str, channels: int = 1, image_size: int = 28, classes: int = 7, stem: str = "auto") -> nn.Module:
    config = TrainConfig.model_validate({"model": model, "network": {"stem": stem}})
    return build_network(config, channels=channels, image_size=image_size, classes=classes)


def without_weights(model: str) -> torch.device:
    """Draws no weights where only shapes matter; RegNet computes its widths with tensors."""
    return torch.device("cpu" if model.startswith("regnet") else "meta")


def first_convolution(built: nn.Module) -> nn.Conv2d:
    return next(layer for layer in built.modules() if isinstance(layer, nn.Conv2d))


def test_the_table_has_all_networks_that_classify_and_have_one_output() -> None:
    """`module=models` leaves out those that segment or detect, those for videos, and quantised ones."""
    assert sorted((*TORCHVISION_NETWORKS, *AUXILIARY)) == sorted(models.list_models(module=models))


@pytest.mark.long
@pytest.mark.parametrize("model", [name for name in TORCHVISION_NETWORKS if not name.startswith("regnet")])
def test_every_name_builds(model: str) -> None:
    with without_weights(model):
        built = network(model, image_size=224)
        assert built(torch.empty(2, 1, 224, 224)).shape == (2, 7)


@pytest.mark.long
@pytest.mark.parametrize("model", FAMILIES)
def test_a_network_of_each_family_passes_the_trial(model: str) -> None:
    check_network(TrainConfig(model=model), channels=3, image_size=96, classes=7)


@pytest.mark.long
@pytest.mark.parametrize("model", FAMILIES)
def test_every_parameter_of_a_network_of_each_family_learns_from_two_images(model: str) -> None:
    torch.manual_seed(0)
    built = network(model, image_size=32).to(memory_format=torch.channels_last)
    logits = built(torch.rand(2, 1, 32, 32))
    nn.functional.cross_entropy(logits, torch.tensor([1, 5])).backward()
    gradients = {name: parameter.grad for name, parameter in built.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.isfinite().all()] == []
    if not model.startswith("vit"):  # their last layer begins with zeros, so the others have no gradient yet
        assert first_convolution(built).weight.grad.any()


@pytest.mark.parametrize("model", [name for name in FAMILIES if name not in TRANSFORMERS])
def test_names_and_original_stem_are_torchvisions(model: str) -> None:
    with without_weights(model):
        theirs = models.get_model(model).state_dict()
        ours = network(model, channels=3, image_size=64, classes=1000).state_dict()
        small = network(model, channels=1, image_size=63, classes=1000).state_dict()
    assert {name: tensor.shape for name, tensor in ours.items()} == {n: tensor.shape for n, tensor in theirs.items()}
    assert small.keys() == theirs.keys()
    assert [name for name in theirs if small[name].shape != theirs[name].shape] == [next(iter(theirs))]


@pytest.mark.parametrize(
    ("image_size", "stem", "small"),
    [(63, "auto", True), (64, "auto", False), (32, "original", False), (96, "small", True)],
)
def test_small_images_are_not_shrunk_by_the_stem(image_size: int, stem: str, small: bool) -> None:
    resnet, mobilenet = (network(name, 1, image_size, stem=stem) for name in ("resnet18", "mobilenet_v3_small"))
    shape = [
        (c.in_channels, c.kernel_size[0], c.stride[0], c.padding[0])
        for c in map(first_convolution, (resnet, mobilenet))
    ]
    assert shape == ([(1, 3, 1, 1)] * 2 if small else [(1, 7, 2, 3), (1, 3, 2, 1)])
    assert isinstance(resnet.maxpool, nn.Identity if small else nn.MaxPool2d)


@pytest.mark.long
@pytest.mark.parametrize("model", FAMILIES)
def test_first_convolution_is_drawn_as_torchvision_draws_it(model: str) -> None:
    torch.manual_seed(0)
    theirs = first_convolution(models.get_model(model))
    # Of the variance that is inversely proportional to the inputs: the area, and where they are counted, the channels.
    stem, channels = ("original", 12) if model in TRANSFORMERS else ("small", 3)
    ours = first_convolution(network(model, channels=channels, image_size=32, stem=stem))
    inputs = ours.weight[0].numel() / theirs.weight[0].numel()
    expected = theirs.weight.std() * (1 if model.startswith("convnext") else inputs**-0.5)
    assert abs(ours.weight.std() / expected - 1) < 0.15
    assert (ours.bias is None) is (theirs.bias is None)
    assert ours.bias is None or bool(ours.bias.any()) is bool(theirs.bias.any())


@pytest.mark.long
def test_a_transformer_has_no_small_stem() -> None:
    with pytest.raises(InputError, match=r"swin_t is a transformer, which has no small stem; leave out network.stem"):
        network("swin_t", image_size=32, stem="small")


def test_a_densenet_loses_the_pooling_of_its_small_stem() -> None:
    small, original = (network("densenet121", image_size=size).features for size in (63, 64))
    assert isinstance(small.pool0, nn.Identity) and isinstance(original.pool0, nn.MaxPool2d)


@pytest.mark.parametrize(
    ("stem", "too_small", "hint"), [("small", 7, "8×8; give larger"), ("original", 31, "32×32; .*stem=small")]
)
def test_convnext_refuses_images_of_which_nothing_would_be_left(stem: str, too_small: int, hint: str) -> None:
    with pytest.raises(InputError, match=rf"{too_small}×{too_small} pixels are too small for convnext_tiny, .*{hint}"):
        network("convnext_tiny", image_size=too_small, stem=stem)
    fits = too_small + 1
    assert network("convnext_tiny", image_size=fits, stem=stem)(torch.empty(2, 1, fits, fits)).shape == (2, 7)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param("convnext_tiny", marks=pytest.mark.slow),
        pytest.param("efficientnet_b0", marks=pytest.mark.slow),
        pytest.param("shufflenet_v2_x1_0", marks=pytest.mark.long),
    ],
)
def test_export_takes_any_number_of_images(model: str) -> None:
    served = ServedClassifier(network(model, image_size=16), (0.5,), (0.3,))
    images = torch.randint(256, (9, 1, 16, 16), dtype=torch.uint8)
    check_export_takes_any_number(served, images)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "resnet_18"}, "unknown network 'resnet_18'; did you mean 'resnet18'"),
        ({"model": "resnet18", "network": {"width": 4}}, "network.width\n *Extra inputs"),
        ({"model": "resnet18", "network": {"stem": "tiny"}}, "'auto', 'small' or 'original'"),
    ],
)
def test_wrong_names_and_options_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainConfig.model_validate(values)
