"""Grad-CAM against a computation by hand, on networks of every family, and on an object whose place is known."""

import pytest
import torch
from torch import Tensor, nn

from cnn.config.training import TrainConfig
from cnn.evaluation.grad_cam import grad_cam
from cnn.networks.build import build_network


class Pooled(nn.Module):
    """A convolution, global average pooling and a linear layer."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.convolution = nn.Sequential(nn.Conv2d(channels, 12, 5, padding=2), nn.ReLU(inplace=True))
        self.linear = nn.Linear(12, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.convolution(images).mean((2, 3)))  # type: ignore[no-any-return]


def test_map_of_a_pooled_network_is_its_class_activation_map() -> None:
    """The sum of the maps, weighted by the linear layer's weights of the class (Zhou et al., 2016)."""
    torch.manual_seed(0)
    network, images, classes = Pooled(3, 5).eval(), torch.randn(6, 3, 10, 10), torch.tensor([0, 1, 2, 3, 4, 0])
    found = grad_cam(network, images, classes)
    assert found is not None and found.shape == (6, 10, 10)
    with torch.no_grad():
        maps = network.convolution(images)
        activation = torch.einsum("nk,nkhw->nhw", network.linear.weight[classes], maps).relu()
    assert torch.allclose(found, activation / activation.amax((1, 2), keepdim=True), atol=1e-6)


class Reusing(Pooled):
    """Uses one activation for the maps, and again for the vector that follows."""

    def __init__(self) -> None:
        super().__init__(3, 5)
        self.relu = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        maps = self.relu(self.convolution(images))
        return self.linear(self.relu(maps.mean((2, 3))))  # type: ignore[no-any-return]


def test_module_that_is_used_again_behind_the_map_is_no_error() -> None:
    torch.manual_seed(0)
    network, images, classes = Reusing().eval(), torch.randn(6, 3, 10, 10), torch.tensor([0, 1, 2, 3, 4, 0])
    found = grad_cam(network, images, classes)
    with torch.no_grad():
        maps = network.convolution(images).relu()
    activation = torch.einsum("nk,nkhw->nhw", network.linear.weight[classes], maps).relu().detach()
    assert found is not None and torch.allclose(found, activation / activation.amax((1, 2), keepdim=True), atol=1e-6)


def test_gradient_is_that_of_the_logit_behind_layers_that_are_not_linear() -> None:
    torch.manual_seed(1)
    body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    head = nn.Sequential(nn.Flatten(), nn.Linear(100, 8), nn.Tanh(), nn.Linear(8, 3))
    images, classes = torch.randn(4, 1, 10, 10), torch.tensor([2, 0, 1, 1])
    found = grad_cam(nn.Sequential(body, head).eval(), images, classes)
    maps = body(images).detach().requires_grad_()
    for image in range(4):
        (gradient,) = torch.autograd.grad(head(maps)[image, classes[image]], maps)
        heat = sum(gradient[image, k].mean() * maps[image, k] for k in range(4)).relu().detach()  # type: ignore[union-attr]
        assert found is not None and torch.allclose(found[image], heat / heat.max().clamp_min(1e-9), atol=1e-6)


def test_maximum_lies_on_the_object_that_the_network_was_trained_to_find() -> None:
    """Class 1 has a bright square in a random quadrant, class 0 has none; nobody tells the network the quadrant."""
    random = torch.Generator().manual_seed(0)

    def batch(count: int) -> tuple[Tensor, Tensor, Tensor]:
        images = 0.3 * torch.randn(count, 1, 24, 24, generator=random)
        labels, quadrants = (torch.randint(most, (count,), generator=random) for most in (2, 4))
        for image, label, quadrant in zip(images, labels.tolist(), quadrants.tolist(), strict=True):
            top, left = (12 * each + 3 for each in divmod(quadrant, 2))
            image[0, top : top + 5, left : left + 5] += 2.0 * label
        return images, labels, quadrants

    torch.manual_seed(0)
    network = Pooled(1, 2)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(60):
        images, labels, _ = batch(64)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    images, labels, quadrants = batch(64)
    images, quadrants = images[labels == 1][:24], quadrants[labels == 1][:24]
    heat = grad_cam(network.eval(), images, torch.ones(len(images), dtype=torch.int64))
    assert heat is not None and len(heat) == 24
    places = heat.flatten(1).argmax(1)
    rows, columns = places // 24, places % 24
    assert torch.equal(rows // 12 * 2 + columns // 12, quadrants)


@pytest.mark.parametrize("model", ["resnet18", "mobilenet_v3_small", "efficientnet_b0", "convnext_tiny", "convoy9"])
def test_every_family_has_a_map_and_computing_it_twice_gives_the_same_bits_and_changes_nothing(model: str) -> None:
    torch.manual_seed(0)
    network = build_network(TrainConfig(model=model), channels=3, image_size=96, classes=4).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images, classes = torch.randn(2, 3, 96, 96), torch.tensor([1, 3])
    maps = [grad_cam(network, images, classes) for _ in range(2)]
    assert maps[0] is not None and maps[1] is not None
    assert maps[0].shape == {"convoy9": (2, 12, 12)}.get(model, (2, 3, 3))
    assert torch.equal(maps[0], maps[1]) and float(maps[0].max()) == 1
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    assert not any(module._forward_hooks for module in network.modules())
    assert torch.is_grad_enabled()


def test_notes_which_flattens_its_last_map_has_one() -> None:
    network = build_network(TrainConfig(model="notes"), channels=1, image_size=28, classes=10).eval()
    found = grad_cam(network, torch.randn(3, 1, 28, 28), torch.tensor([0, 1, 2]))
    assert found is not None and found.shape == (3, 5, 5)


class Tokens(nn.Module):
    """A patch embedding, whose output is a map, and then a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.mixer, self.linear = nn.Conv2d(1, 6, 4, 4), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.mixer(self.patches(images).flatten(2).mT).mean(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "network",
    [
        pytest.param(build_network(TrainConfig(), channels=1, image_size=8, classes=10), id="a map of 2×2"),
        pytest.param(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), id="no map"),
        pytest.param(Tokens(), id="a transformer, whose map is not the last word"),
        pytest.param(
            nn.Sequential(nn.Conv2d(1, 6, (1, 3)), nn.Flatten(), nn.Linear(288, 2)), id="a map that is not square"
        ),
    ],
)
def test_network_without_a_useful_map_has_none(network: nn.Module) -> None:
    assert grad_cam(network.eval(), torch.randn(2, 1, 8, 8), torch.tensor([0, 1])) is None


def test_class_that_nothing_speaks_for_has_a_map_of_zeros() -> None:
    network = Pooled(1, 2).eval()
    with torch.no_grad():
        network.linear.weight.fill_(-1.0)
    found = grad_cam(network, torch.randn(1, 1, 8, 8), torch.tensor([0]))
    assert found is not None and not found.any()
