"""Batch augmentation changes images as torchvision's transforms do."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2

from cnn.config.training import AugmentConfig
from cnn.networks.wrappers import Normalise
from cnn.networks.wrappers import TestTimeFlip as FlippedNetwork
from cnn.serving.classifier import ServedClassifier
from cnn.training.augment import augment, mix
from tests.cnn.conftest import check_export_takes_any_number

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
        # RandomErasing keeps the square inside, so there is padding for one whose centre is in the image's corner.
        (
            NOTHING.model_copy(update={"cutout": 2}),
            v2.Compose(
                [
                    v2.Pad([1, 1, 0, 0]),
                    v2.RandomErasing(p=1, scale=(4 / 30, 4 / 30), ratio=(1, 1)),
                    v2.Lambda(lambda image: image[..., 1:, 1:]),
                ]
            ),
        ),
    ],
    ids=["flip", "shift", "cutout"],
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


SIZE = 8  # images in a batch that is mixed
HEIGHT, WIDTH = 6, 9
Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def mixed_by(generator: torch.Generator, **options: float) -> Mix:
    return lambda images, labels: mix(images, labels, SIZE, AugmentConfig(**options), generator)


def mixed_batches(mixing: Mix, draws: int) -> tuple[Tensor, Tensor]:
    """Many mixed batches, draws×N×H×W, and their targets, draws×N×classes; image and label i are i."""
    labels = torch.arange(SIZE)
    images = labels.float().view(-1, 1, 1, 1).expand(-1, 1, HEIGHT, WIDTH)
    mixed = [mixing(images, labels) for _ in range(draws)]
    return torch.stack([images[:, 0] for images, _ in mixed]), torch.stack([targets for _, targets in mixed])


def own_shares(targets: Tensor) -> Tensor:
    """Returns the share that images keep, one per batch; an image may be its own partner, but not all eight images."""
    return targets.diagonal(dim1=1, dim2=2).amin(1).round(decimals=4)  # whatever the order of the arithmetic


def kolmogorov_smirnov(ours: Tensor, theirs: Tensor) -> float:
    """The largest distance of two samples' distribution functions; a correct 3000 pass 0.07 once in a million."""
    points = torch.cat([ours, theirs])
    shares = [torch.searchsorted(s.sort().values, points, right=True) / len(s) for s in (ours, theirs)]
    return float((shares[0] - shares[1]).abs().max())


@pytest.mark.long
@pytest.mark.parametrize("alpha", [0.2, 1.0])
@pytest.mark.parametrize(("kind", "theirs"), [("mixup", v2.MixUp), ("cutmix", v2.CutMix)])
def test_shares_are_distributed_as_in_torchvision(kind: str, theirs: type[v2.Transform], alpha: float) -> None:
    torch.manual_seed(0)
    _, targets = mixed_batches(mixed_by(torch.Generator().manual_seed(1), **{kind: alpha}), 3000)
    _, reference = mixed_batches(theirs(alpha=alpha, num_classes=SIZE), 3000)
    _, another = mixed_batches(theirs(alpha=3 * alpha, num_classes=SIZE), 3000)
    assert kolmogorov_smirnov(own_shares(targets), own_shares(reference)) < 0.07
    assert kolmogorov_smirnov(own_shares(targets), own_shares(another)) > 0.07


@pytest.mark.long
def test_boxes_lie_where_those_of_torchvision_do() -> None:
    def boxes(mixing: Mix) -> Tensor:
        images, targets = mixed_batches(mixing, DRAWS)
        foreign = images != torch.arange(SIZE).view(-1, 1, 1)
        boxes = foreign.any(1)
        own_partner = ~foreign.any((2, 3), keepdim=True)
        assert ((foreign == boxes[:, None]) | own_partner).all()
        assert torch.equal(boxes.sum((1, 2)), boxes.any(2).sum(1) * boxes.any(1).sum(1))  # rectangles
        torch.testing.assert_close(own_shares(targets), 1 - boxes.float().mean((1, 2)), atol=1e-4, rtol=0)
        return boxes.double()

    torch.manual_seed(0)
    ours = boxes(mixed_by(torch.Generator().manual_seed(1), cutmix=1.0)).mean(0)
    reference = boxes(v2.CutMix(alpha=1.0, num_classes=SIZE)).mean(0)
    assert ((ours - reference).abs() < 5 * (2 * reference * (1 - reference) / DRAWS).sqrt()).all()


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_targets_say_what_is_in_the_images(kind: str) -> None:
    images, targets = mixed_batches(mixed_by(torch.Generator().manual_seed(1), **{kind: 1.0}), 300)
    assert targets.dtype == torch.float32
    torch.testing.assert_close(targets.sum(2), torch.ones(300, SIZE))
    torch.testing.assert_close(images.mean((2, 3)), targets @ torch.arange(SIZE).float())


@pytest.mark.long
def test_every_image_is_as_likely_a_partner() -> None:
    _, targets = mixed_batches(mixed_by(torch.Generator().manual_seed(1), mixup=1.0), DRAWS)
    foreign = targets.masked_fill(torch.eye(SIZE, dtype=torch.bool), 0)
    partners = (foreign > 0).double()
    partners += torch.diag_embed(1 - partners.sum(2))  # or itself
    share = 1 / SIZE
    assert ((partners.mean(0) - share).abs() < 5 * (share * (1 - share) / DRAWS) ** 0.5).all()


def test_mixup_and_cutmix_take_turns_at_random() -> None:
    images, _ = mixed_batches(mixed_by(torch.Generator().manual_seed(1), mixup=1.0, cutmix=1.0), 1000)
    blended = (images != images.round()).any((1, 2, 3)).double().mean()
    assert abs(blended - 0.5) < 5 * 0.5 / 1000**0.5


@pytest.mark.parametrize("alpha", [0.01, 100])
def test_extreme_alphas_give_finite_shares(alpha: float) -> None:
    _, targets = mixed_batches(mixed_by(torch.Generator().manual_seed(1), mixup=alpha), 3000)
    assert targets.isfinite().all()
    nearest = (own_shares(targets) - (0.5 if alpha > 1 else own_shares(targets).round())).abs()
    assert nearest.median() < 0.05


def test_mixing_is_a_function_of_the_generators_seed_and_keeps_the_memory_format() -> None:
    images = torch.rand(16, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(16) % SIZE

    def draw(seed: int) -> tuple[Tensor, Tensor]:
        return mixed_by(torch.Generator().manual_seed(seed), mixup=1.0, cutmix=1.0)(images, labels)

    assert all(map(torch.equal, draw(3), draw(3)))
    assert not any(map(torch.equal, draw(3), draw(4)))
    for seed in range(8):
        assert draw(seed)[0].is_contiguous(memory_format=torch.channels_last)
        assert not draw(seed)[0].is_contiguous()


def test_without_mixing_images_and_labels_are_untouched() -> None:
    images, labels = torch.rand(4, 1, 5, 5), torch.arange(4)
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    same_images, same_labels = mix(images, labels, SIZE, AugmentConfig(), generator)
    assert same_images is images and same_labels is labels
    assert torch.equal(generator.get_state(), before)


class NoReading(TorchDispatchMode):
    """Fails where the values of a tensor, and not only its shape, would be known to the host."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        reads = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}
        assert function not in reads, f"{function} makes the host wait for the device"
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("options", [{"mixup": 1.0}, {"cutmix": 1.0}, {"mixup": 1.0, "cutmix": 1.0}])
def test_nothing_is_read_from_the_device(options: dict[str, float]) -> None:
    config = AugmentConfig(cutout=2, **options)
    images, generator = torch.zeros(8, 1, 9, 9, dtype=torch.uint8), torch.Generator().manual_seed(1)
    with NoReading():
        mix(augment(images, config, generator).float(), torch.arange(8), SIZE, config, generator)
    with NoReading(), pytest.raises(AssertionError, match="wait for the device"):
        torch.ones(()).item()


def test_test_time_flip_gives_mirror_images_the_same_logits_which_are_the_mean() -> None:
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 5, 7))
    images = torch.rand(2, 3, 4, 5)
    logits = FlippedNetwork(network)(images)
    torch.testing.assert_close(logits, torch.stack([network(images), network(images.flip(3))]).mean(0))
    torch.testing.assert_close(logits, FlippedNetwork(network)(images.flip(3)))
    assert not torch.allclose(logits, network(images))


def test_test_time_flip_survives_export() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 6 * 6, 5))
    served = ServedClassifier(FlippedNetwork(network), (0.2, 0.4, 0.6), (0.1, 0.2, 0.3))
    images = torch.randint(256, (9, 3, 8, 8), dtype=torch.uint8)
    check_export_takes_any_number(served, images)
