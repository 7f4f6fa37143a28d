"""Batch augmentation changes images as torchvision's per-sample transforms do."""

from collections import Counter

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from cnn.augment import Normalise, augment
from cnn.config import AugmentConfig

NOTHING = AugmentConfig(flip=False, shift=0, cutout=0)
DRAWS = 4000


def outcomes(images: Tensor) -> Counter[bytes]:
    return Counter(image.numpy().tobytes() for image in images)


@pytest.fixture
def image() -> Tensor:
    return torch.arange(1, 2 * 4 * 5 + 1, dtype=torch.uint8).view(1, 2, 4, 5)


@pytest.mark.parametrize(
    ("config", "theirs"),
    [
        (NOTHING.model_copy(update={"flip": True}), v2.RandomHorizontalFlip()),
        (NOTHING.model_copy(update={"shift": 1}), v2.RandomCrop((4, 5), padding=1)),
    ],
    ids=["flip", "shift"],
)
def test_outcomes_are_as_frequent_as_with_torchvision(
    config: AugmentConfig, theirs: v2.Transform, image: Tensor
) -> None:
    torch.manual_seed(0)
    ours = outcomes(augment(image.expand(DRAWS, -1, -1, -1), config, torch.Generator().manual_seed(1)))
    reference = outcomes(torch.cat([theirs(image) for _ in range(DRAWS)]))
    assert ours.keys() == reference.keys()
    for outcome, count in reference.items():
        # Both counts are binomial; five standard deviations of their difference are missed once in a million.
        assert abs(ours[outcome] - count) < 5 * (2 * count) ** 0.5


def test_cutout_blanks_one_square_anywhere(image: Tensor) -> None:
    changed = augment(
        image.expand(DRAWS, -1, -1, -1), NOTHING.model_copy(update={"cutout": 2}), torch.Generator().manual_seed(1)
    )
    blank = changed == 0
    assert torch.equal(changed[~blank], image.expand_as(changed)[~blank])
    assert torch.equal(blank[:, 0], blank[:, 1])
    rows, columns = blank[:, 0].any(2).sum(1), blank[:, 0].any(1).sum(1)
    assert torch.equal(blank[:, 0].sum((1, 2)), rows * columns)  # a rectangle
    assert rows.max() == columns.max() == 2
    assert len(outcomes(changed)) == 4 * 5  # every centre


def test_it_is_a_function_of_the_generators_seed(image: Tensor) -> None:
    batch = image.expand(64, -1, -1, -1)

    def draw(seed: int) -> Tensor:
        return augment(batch, AugmentConfig(cutout=2), torch.Generator().manual_seed(seed))

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))
    assert torch.equal(augment(batch, NOTHING, torch.Generator()), batch)


def test_normalise_gives_zero_mean_and_unit_variance() -> None:
    images = torch.randint(256, (50, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scaled = images.double() / 255
    mean, std = scaled.mean((0, 2, 3)), scaled.std((0, 2, 3), correction=0)
    normalised = Normalise(tuple(mean.tolist()), tuple(std.tolist()))(images)
    expected = v2.functional.normalize(scaled, mean.tolist(), std.tolist()).float()
    torch.testing.assert_close(normalised, expected, atol=1e-5, rtol=0)
    assert normalised.is_contiguous(memory_format=torch.channels_last)


def test_normalise_survives_a_constant_channel() -> None:
    assert Normalise((0.5,), (0.0,))(torch.full((2, 1, 3, 3), 128, dtype=torch.uint8)).isfinite().all()
