"""What the libraries know of the weights that they publish, and how images are normalised for them."""

import re

import pytest
import torch
from pydantic import ValidationError
from torchvision import models

from cnn.config.networks import TORCHVISION_NETWORKS
from cnn.config.training import TrainConfig
from cnn.data.manifest import Manifest
from cnn.errors import InputError
from cnn.networks.published import published_weights, with_present_names
from cnn.networks.wrappers import normalisation
from tests.cnn.conftest import source_report


@pytest.mark.parametrize("model", TORCHVISION_NETWORKS)
def test_each_network_of_torchvision_has_weights_whose_file_states_its_digest(model: str) -> None:
    try:
        weights = published_weights(model)
    except InputError as error:
        others = {each.name for each in models.get_model_weights(model)}
        assert others == {"IMAGENET1K_SWAG_E2E_V1", "IMAGENET1K_SWAG_LINEAR_V1"}  # not for commercial use
        assert str(error) == (
            f"pretrained=imagenet: no ImageNet weights of {model} are known; give a safetensors file (pretrained=FILE)"
        )
        return
    (address,) = weights.addresses
    assert re.fullmatch(r"https://download\.pytorch\.org/models/.+-[0-9a-f]{8,}\.pth", address)
    assert weights.name.startswith(f"torchvision/{model}.IMAGENET1K_V")
    assert len(weights.mean) == len(weights.std) == 3 and weights.size and weights.size > 1e6


def test_the_newest_of_torchvisions_weights_is_taken() -> None:
    assert published_weights("resnet50").addresses == ("https://download.pytorch.org/models/resnet50-11ad3fa6.pth",)
    assert published_weights("resnet18").mean == (0.485, 0.456, 0.406)


def test_weights_of_timm_are_those_of_the_hub_and_of_its_own_releases() -> None:
    weights = published_weights("efficientnet_lite0")
    assert weights.name == "timm/tf_efficientnet_lite0.in1k"
    assert weights.addresses == (
        "hf:timm/tf_efficientnet_lite0.in1k/model.safetensors",
        "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-weights/tf_efficientnet_lite0-0aa007d2.pth",
    )
    assert (weights.mean, weights.std, weights.licence) == ((0.5,) * 3, (0.5,) * 3, "apache-2.0")


def test_names_of_old_files_of_densenet_become_those_of_today() -> None:
    with torch.device("meta"):
        today = models.densenet121().state_dict()
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", name): value for name, value in today.items()}
    assert old.keys() != today.keys()
    assert with_present_names(old).keys() == today.keys() == with_present_names(today).keys()


@pytest.mark.parametrize("model", ["convoy9", "notes"])
def test_weights_that_nobody_has_published_are_refused_with_the_configuration(model: str) -> None:
    with pytest.raises(ValidationError, match=rf"nobody has published such weights of {model}; choose a network of"):
        TrainConfig(model=model, pretrained="imagenet")


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"pretrained_mean": (0.5,)}, "need each other"),
        ({"pretrained_mean": (1.5,), "pretrained_std": (0.5,)}, "pretrained_mean: give a number from 0"),
        ({"pretrained_mean": (0.5,), "pretrained_std": (0.0,)}, "pretrained_std: give a positive number"),
        ({"pretrained_mean": (), "pretrained_std": ()}, "at least 1 item"),
    ],
)
def test_a_normalisation_that_cannot_be_meant_is_refused(values: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        TrainConfig.model_validate(values)


def manifest(channels: int) -> Manifest:
    statistics = {"mean": (0.25,) * channels, "std": (0.125,) * channels}
    return Manifest(
        classes=("a", "b"), channels=channels, image_size=8, splits={}, report=source_report(), **statistics
    )


def test_normalisation_follows_the_weights_and_else_the_training_split() -> None:
    config = TrainConfig(pretrained_mean=(0.3, 0.4, 0.8), pretrained_std=(0.2, 0.3, 0.4))
    assert normalisation(TrainConfig(), manifest(3)) == ((0.25,) * 3, (0.125,) * 3)
    assert normalisation(config, manifest(3)) == ((0.3, 0.4, 0.8), (0.2, 0.3, 0.4))
    assert normalisation(config, manifest(1)) == (pytest.approx((0.5,)), pytest.approx((0.3,)))
