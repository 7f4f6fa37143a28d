"""timm's networks by name."""

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn

from cnn.config.networks import timm_names
from cnn.config.training import TrainConfig
from cnn.errors import InputError
from cnn.networks.build import build_network
from cnn.networks.trial import check_network
from cnn.serving.classifier import ServedClassifier
from cnn.training.random_streams import seed_default_generator
from tests.cnn.conftest import check_export_takes_any_number


def network(name: str, channels: int = 3, image_size: int = 28, classes: int = 7, **options: object) -> nn.Module:
    config = TrainConfig(model=name, network=options)
    return build_network(config, channels=channels, image_size=image_size, classes=classes)


def strides(built: nn.Module, channels: int = 3) -> list[int]:
    """Returns the strides of the convolutions that read the image."""
    layers = (layer for layer in built.modules() if isinstance(layer, nn.Conv2d))
    return [layer.stride[0] for layer in layers if layer.in_channels == channels]


def test_the_names_that_are_read_from_timms_source_are_those_that_it_lists() -> None:
    assert list(timm_names()) == sorted(timm.list_models())


@pytest.mark.parametrize("name", ["resnet18d", "tf_efficientnet_lite0", "convnext_atto", "mobilenetv3_small_050"])
@pytest.mark.parametrize(("channels", "image_size"), [(1, 64), (3, 97)])
def test_a_network_takes_grey_and_colour_of_any_size(name: str, channels: int, image_size: int) -> None:
    logits = network(f"timm/{name}", channels, image_size)(torch.rand(2, channels, image_size, image_size))
    assert logits.shape == (2, 7) and logits.isfinite().all()


def test_weights_have_timms_names_and_shapes_with_any_stem() -> None:
    theirs = {name: tensor.shape for name, tensor in timm.create_model("resnet18d").state_dict().items()}
    for size in (28, 64):
        ours = network("timm/resnet18d", image_size=size, classes=1000).state_dict()
        assert {name: tensor.shape for name, tensor in ours.items()} == theirs


def test_efficientnet_lite0_is_timms() -> None:
    torch.manual_seed(3)
    ours = network("efficientnet_lite0", image_size=64)
    torch.manual_seed(3)
    theirs = timm.create_model("tf_efficientnet_lite0", num_classes=7)
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(ours.eval()(images), theirs.eval()(images))


@pytest.mark.parametrize(
    ("name", "image_size", "stem", "expected"),
    [
        ("resnet18d", 63, "auto", [1]),
        ("resnet18d", 64, "auto", [2]),
        ("resnet18d", 32, "original", [2]),
        ("resnet18d", 96, "small", [1]),
        ("repvgg_a0", 32, "auto", [1, 1]),  # two convolutions, side by side
        ("convnext_atto", 32, "small", [4]),  # patches
        ("vit_tiny_patch16_224", 32, "auto", [16]),
    ],
)
def test_small_images_are_not_shrunk_by_the_stem(name: str, image_size: int, stem: str, expected: list[int]) -> None:
    built = network(f"timm/{name}", image_size=image_size, stem=stem)
    assert strides(built) == expected
    assert built(torch.rand(2, 3, image_size, image_size)).shape == (2, 7)


@pytest.mark.parametrize(("name", "pooling"), [("resnet18d", "maxpool"), ("densenet121", "features.pool0")])
def test_a_small_stem_has_no_pooling(name: str, pooling: str) -> None:
    small, original = (network(f"timm/{name}", image_size=size).get_submodule(pooling) for size in (63, 64))
    assert isinstance(small, nn.Identity) and not isinstance(original, nn.Identity)


def test_rates_reach_the_network() -> None:
    built = network("efficientnet_lite0", drop_rate=0.3, drop_path_rate=0.2)
    assert built.drop_rate == 0.3
    rates = [layer.drop_prob for layer in built.modules() if isinstance(layer, DropPath)]
    assert rates == sorted(rates) and 0.17 < rates[-1] < 0.2  # the last stage's last block
    plain = network("efficientnet_lite0")
    assert plain.drop_rate == 0 and not any(isinstance(layer, DropPath) for layer in plain.modules())


@pytest.mark.parametrize(("name", "rate"), [("densenet121", "drop_path_rate"), ("ghostnet_050", "drop_path_rate")])
def test_a_rate_that_a_network_lacks_is_refused(name: str, rate: str) -> None:
    with pytest.raises(InputError, match=f"timm/{name} has no {rate}; leave out network.{rate}"):
        network(f"timm/{name}", **{rate: 0.1})


def test_dropout_and_drop_path_are_functions_of_the_lanes_seed() -> None:
    built = network("timm/resnet18d", drop_rate=0.5, drop_path_rate=0.5)
    images = torch.rand(8, 3, 28, 28)

    def logits(lane: int) -> torch.Tensor:
        seed_default_generator(torch.device("cpu"), 0, "dropout", 5, lane)
        found: torch.Tensor = built(images)
        return found

    assert torch.equal(logits(0), logits(0))
    assert not torch.equal(logits(0), logits(1))


@pytest.mark.long
@pytest.mark.parametrize("name", ["timm/resnet18d", "efficientnet_lite0", "timm/convnext_atto"])
def test_export_takes_any_number_of_images(name: str) -> None:
    served = ServedClassifier(network(name, image_size=32), (0.5,) * 3, (0.3,) * 3)
    images = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8)
    check_export_takes_any_number(served, images)


@pytest.mark.parametrize(
    ("name", "image_size", "message"),
    [
        ("convnext_atto", 8, r"timm/convnext_atto cannot be computed for images of 3×8×8: .*; set data.image_size=32"),
        ("vit_tiny_patch16_224", 28, r"cuts images into patches of 16×16 pixels, so .*; set data.image_size=32"),
    ],
)
def test_images_that_a_network_cannot_take_are_refused_with_the_next_size(
    name: str, image_size: int, message: str
) -> None:
    with pytest.raises(InputError, match=message) as refused:
        check_network(TrainConfig(model=f"timm/{name}"), channels=3, image_size=image_size, classes=7)
    assert "\n" not in str(refused.value)
