import pytest
import torch
from torch import nn

from cnn.config.training import TrainConfig
from cnn.errors import InputError
from cnn.networks.build import build_network


def network(model: str, channels: int = 1, image_size: int = 28, classes: int = 10, **options: object) -> nn.Module:
    config = TrainConfig(model=model, network=options)
    return build_network(config, channels=channels, image_size=image_size, classes=classes)


@pytest.mark.parametrize("model", ["notes", "convoy9"])
@pytest.mark.parametrize(("channels", "image_size"), [(1, 28), (3, 32), (3, 97), (1, 10)])
def test_our_networks_take_images_of_any_shape(model: str, channels: int, image_size: int) -> None:
    logits = network(model, channels, image_size, classes=7)(torch.rand(3, channels, image_size, image_size))
    assert logits.shape == (3, 7)
    assert logits.isfinite().all()


@pytest.mark.parametrize("model", ["notes", "convoy9", "efficientnet_lite0", "resnet18", "timm/resnet18d"])
def test_a_name_of_each_kind_builds_its_network(model: str) -> None:
    assert network(model, channels=3, image_size=32, classes=7)(torch.rand(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("stem", [{}, {"stem_width": 6, "stem_kernel": 2}])
def test_convoy9_takes_a_single_pixel(stem: dict[str, int]) -> None:
    assert network("convoy9", image_size=1, **stem)(torch.rand(2, 1, 1, 1)).shape == (2, 10)


def test_the_first_convolution_of_convoy9_can_be_smaller_and_the_rest_stays() -> None:
    usual, small = (network("convoy9", width=8, **stem) for stem in ({}, {"stem_width": 4, "stem_kernel": 2}))
    shapes, smaller = ({key: tuple(value.shape) for key, value in each.state_dict().items()} for each in (usual, small))
    assert smaller["stem.0.weight"] == (4, 1, 2, 2)
    assert smaller["stage1.0.0.weight"] == (16, 4, 3, 3)
    of_stem = {key for key in shapes if key.startswith("stem") or key == "stage1.0.0.weight"}
    assert {key for key in shapes if shapes[key] != smaller[key]} == of_stem - {"stem.2.num_batches_tracked"}
    assert small.stem(torch.rand(2, 1, 28, 28)).shape == (2, 4, 14, 14)


def test_notes_is_the_network_of_the_notes() -> None:
    """Filters, kernels, strides, pooling, flatten, dropout and linear layers follow the options."""
    built = build_network(
        TrainConfig(
            model="notes",
            network={
                "channels": [32, 48],
                "kernel_sizes": [3, 5],
                "strides": [1, 2],
                "pool_size": 3,
                "pool_stride": 2,
                "hidden": [64, 16],
                "dropout": 0.4,
            },
        ),
        channels=3,
        image_size=48,
        classes=5,
    )
    layers = list(built)
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    shapes = [(c.in_channels, c.out_channels, c.kernel_size[0], c.stride[0]) for c in convolutions]
    assert shapes == [(3, 32, 3, 1), (32, 48, 5, 2)]
    assert {(p.kernel_size, p.stride) for p in layers if isinstance(p, nn.MaxPool2d)} == {(3, 2)}
    assert sum(isinstance(layer, nn.Flatten) for layer in layers) == 1
    assert {layer.p for layer in layers if isinstance(layer, nn.Dropout)} == {0.4}
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    # 48 → conv 3 → 46 → pool 3/2 → 22 → conv 5/2 → 9 → pool 3/2 → 4: the input size 48·4·4 is found.
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(48 * 4 * 4, 64), (64, 16), (16, 5)]


def test_notes_refuses_images_of_which_nothing_would_be_left() -> None:
    with pytest.raises(InputError, match=r"6×6 pixels are too small for notes: nothing is left after layer 2"):
        network("notes", image_size=6)


def test_equal_seeds_give_equal_weights_and_others_do_not() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(network("convoy9", width=8).parameters())

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
