"""The trial of a network before a training: networks that could not be trained exactly are refused by name."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cnn.config.training import TrainConfig
from cnn.errors import InputError
from cnn.networks import trial
from cnn.networks.trial import check_network


class Classifier(nn.Module):
    """A network without a fault."""

    def __init__(self, channels: int = 3, classes: int = 7) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, 8, 5), nn.BatchNorm2d(8), nn.Dropout(0.1), nn.ReLU())
        self.linear = nn.Linear(8, classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.body(images).mean(dim=(2, 3)))
        return logits


class Auxiliary(Classifier):
    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return (logits, logits) if self.training else logits  # type: ignore[return-value]


class Features(Classifier):
    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.body(images)
        return maps


class Memory(Classifier):
    """Counts images in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return super().forward(images)


class Centre(Memory):
    """Puts a new tensor in the place of the buffer."""

    def forward(self, images: Tensor) -> Tensor:
        self.seen = self.seen * 0.9
        return Classifier.forward(self, images)


class Unused(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)


def check(monkeypatch: pytest.MonkeyPatch, build: Callable[[], nn.Module], image_size: int = 8) -> None:
    monkeypatch.setattr(trial, "build_network", lambda *_, **__: build())
    check_network(TrainConfig(model="resnet18"), channels=3, image_size=image_size, classes=7)


def test_batch_norm_and_dropout_are_accepted_and_the_default_generator_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = torch.get_rng_state()
    check(monkeypatch, Classifier)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (Auxiliary, "resnet18 has 2 outputs in training, but a classifier has one"),
        (Features, "resnet18 classifies no images: it returns 2×8×4×4 numbers for 2 images of 7 classes"),
        (Memory, "resnet18 changes seen in training; lanes can share the averages of batch norm only"),
        (Centre, "resnet18 changes seen in training; lanes can share the averages of batch norm only"),
        (Unused, "resnet18 does not use spare.weight in training, so it has no gradient"),
    ],
)
def test_a_network_that_lanes_cannot_train_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, build: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises(InputError) as refused:
        check(monkeypatch, build)
    assert str(refused.value) == message


def test_images_that_are_too_small_are_refused_with_the_first_size_that_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(InputError, match=r"resnet18 cannot be computed for images of 3×4×4: .*; set data.image_size=8"):
        check(monkeypatch, Classifier, image_size=4)


def test_channels_that_no_size_helps_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"images of 3×8×8: Invalid channel dimensions; choose another network"):
        check(monkeypatch, lambda: Classifier(channels=1))
