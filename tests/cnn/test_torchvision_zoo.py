"""torchvision's networks by name, for images of any size."""

from collections.abc import Iterator

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torchvision import models

from cnn.config.networks import TORCHVISION_NETWORKS
from cnn.config.training import TrainConfig
from cnn.errors import InputError
from cnn.networks.build import build_network
from cnn.serving.classifier import ServedClassifier


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """As in training."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def network(model: str, channels: int = 1, image_size: int = 28, classes: int = 7, stem: str = "auto") -> nn.Module:
    config = TrainConfig.model_validate({"model": model, "network": {"stem": stem}})
    return build_network(config, channels=channels, image_size=image_size, classes=classes)


def first_convolution(built: nn.Module) -> nn.Conv2d:
    return next(layer for layer in built.modules() if isinstance(layer, nn.Conv2d))


@pytest.mark.parametrize("model", TORCHVISION_NETWORKS)
@pytest.mark.parametrize(("channels", "image_size"), [(3, 97), (1, 10)])
def test_every_name_builds_for_images_of_any_shape(model: str, channels: int, image_size: int) -> None:
    built = network(model, channels, image_size)
    assert built(torch.empty(2, channels, image_size, image_size)).shape == (2, 7)


@pytest.mark.parametrize("model", TORCHVISION_NETWORKS)
@pytest.mark.parametrize(("channels", "image_size"), [(1, 28), (3, 32)])
def test_every_parameter_of_every_network_learns_from_two_images(model: str, channels: int, image_size: int) -> None:
    torch.manual_seed(0)
    built = network(model, channels, image_size).to(memory_format=torch.channels_last)
    logits = built(torch.rand(2, channels, image_size, image_size))
    nn.functional.cross_entropy(logits, torch.tensor([1, 5])).backward()
    gradients = {name: parameter.grad for name, parameter in built.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.isfinite().all()] == []
    assert first_convolution(built).weight.grad.any()


@pytest.mark.parametrize("model", TORCHVISION_NETWORKS)
def test_names_and_original_stem_are_torchvisions(model: str) -> None:
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


@pytest.mark.parametrize("model", TORCHVISION_NETWORKS)
def test_first_convolution_is_drawn_as_torchvision_draws_it(model: str) -> None:
    torch.manual_seed(0)
    theirs = first_convolution(models.get_model(model))
    ours = first_convolution(network(model, channels=theirs.in_channels, image_size=28, stem="small"))
    area = (3 / theirs.kernel_size[0]) ** 2  # the variance is inversely proportional to the area, but for ConvNeXt
    expected = theirs.weight.std() * (1 if model.startswith("convnext") else area**-0.5)
    assert abs(ours.weight.std() / expected - 1) < 0.15
    assert ours.bias is None or not ours.bias.any()


@pytest.mark.parametrize(
    ("stem", "too_small", "hint"), [("small", 7, "8×8; give larger"), ("original", 31, "32×32; .*stem=small")]
)
def test_convnext_refuses_images_of_which_nothing_would_be_left(stem: str, too_small: int, hint: str) -> None:
    with pytest.raises(InputError, match=rf"{too_small}×{too_small} pixels are too small for convnext_tiny, .*{hint}"):
        network("convnext_tiny", image_size=too_small, stem=stem)
    fits = too_small + 1
    assert network("convnext_tiny", image_size=fits, stem=stem)(torch.empty(2, 1, fits, fits)).shape == (2, 7)


@pytest.mark.parametrize("model", ["convnext_tiny", "efficientnet_b0", "shufflenet_v2_x1_0"])
def test_export_takes_any_number_of_images(model: str) -> None:
    served = ServedClassifier(network(model, image_size=16), (0.5,), (0.3,))
    images = torch.randint(256, (9, 1, 16, 16), dtype=torch.uint8)
    exported = torch.export.export(served, (images[:2],), dynamic_shapes=[{0: torch.export.Dim.AUTO}]).module()
    with torch.inference_mode():
        whole = served(images)
        for count in (1, 3, 9):
            torch.testing.assert_close(exported(images[:count]), whole[:count])


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
