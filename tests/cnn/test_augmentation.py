"""Resized crops, rotations, colours, erasing and TrivialAugment are those of torchvision's per-image transforms."""

import hashlib
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tv

from cnn.config.training import AugmentConfig
from cnn.training.augment import ERASED_AREA, augment
from cnn.training.augmentation import colour, geometry, trivial
from tests.cnn.test_augment import NoReading, kolmogorov_smirnov

DRAWS = 3000
UNIT = {"Solarize": 255}
"""What a strength of torchvision's is multiplied by."""

BILINEAR = InterpolationMode.BILINEAR
EVERYTHING: dict[str, Any] = {
    **{"crop_area": 0.3, "crop_size": 20, "rotation": 20, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4},
    **{"hue": 0.1, "erase": 0.5, "policy": "trivial", "cutout": 3},
}


def config(**keys: Any) -> AugmentConfig:
    return AugmentConfig.model_validate({"flip": False, "shift": 0} | keys)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def photographs(count: int = 8, channels: int = 3, size: int = 32) -> Tensor:
    """Smooth images with noise, all values, a grey one and one of a single colour."""
    low = torch.rand(count, channels, 5, 5, generator=seeded(1))
    images = F.interpolate(low, (size, size), mode="bilinear") * 255
    images = (images + 12 * torch.randn(images.shape, generator=seeded(2))).clamp(0, 255).round()
    images[1] = images[1].mean(0, keepdim=True).round()
    images[2] = images[2, :, :1, :1]
    return images.byte()


def largest_difference(ours: Tensor, theirs: Tensor) -> int:
    assert ours.shape == theirs.shape
    return int((ours.int() - theirs.int()).abs().max())


# Today's augmentation


def test_configurations_without_new_keys_give_the_same_bits_as_before() -> None:
    images = torch.arange(64 * 3 * 8 * 8).remainder(251).byte().view(64, 3, 8, 8)
    changed = augment(images, AugmentConfig(cutout=3), seeded(5))
    digest = hashlib.sha256(changed.numpy().tobytes()).hexdigest()
    assert digest == "b6bcdc9f76130e73b7d02cec57fa8dff52e70c9a18f8f8e67cd892b88ddec9c2"  # of commit aa6d89c


# Crops and erased boxes


def figures(boxes: list[tuple[float, ...]], size: tuple[int, int]) -> dict[str, Tensor]:
    """Returns the distributed figures of boxes (top, left, height, width)."""
    top, left, height, width = torch.tensor(boxes, dtype=torch.float64).unbind(1)
    return {
        "area": height * width / (size[0] * size[1]),
        "aspect": (width / height).log(),
        "top": top / (size[0] - height).clamp(min=1),
        "left": left / (size[1] - width).clamp(min=1),
    }


def our_boxes(size: tuple[int, int], **options: Any) -> list[tuple[float, ...]]:
    boxes = geometry.random_boxes(DRAWS, size, generator=seeded(1), **options)
    assert boxes.found.all()
    return list(zip(*(each.tolist() for each in boxes[:4]), strict=True))


@pytest.mark.parametrize("size", [(40, 56), (160, 160)])
def test_crops_are_distributed_as_in_torchvision(size: tuple[int, int]) -> None:
    def theirs(smallest: float) -> dict[str, Tensor]:
        torch.manual_seed(0)
        transform = v2.RandomResizedCrop(9, scale=(smallest, 1))
        made = (transform.make_params([torch.empty(1, *size)]) for _ in range(DRAWS))
        return figures([(p["top"], p["left"], p["height"], p["width"]) for p in made], size)

    ours = figures(our_boxes(size, area=(0.3, 1), aspect=(3 / 4, 4 / 3)), size)
    reference, another = theirs(0.3), theirs(0.4)
    for name, values in ours.items():
        assert kolmogorov_smirnov(values, reference[name]) < 0.07, name
    assert kolmogorov_smirnov(ours["area"], another["area"]) > 0.07


@pytest.mark.parametrize(("crop_size", "area"), [(32, 0.3), (20, 0.5), (None, 0.1)])
def test_a_crop_has_the_pixels_of_torchvisions(crop_size: int | None, area: float) -> None:
    images = photographs(16)
    cropped = augment(images, config(crop_area=area, crop_size=crop_size), seeded(3))
    boxes = geometry.random_boxes(16, (32, 32), area=(area, 1), aspect=(3 / 4, 4 / 3), generator=seeded(3))
    size = [crop_size or 32] * 2
    theirs = [
        tv.resized_crop(image, *(int(each[i]) for each in boxes[:4]), size, interpolation=BILINEAR, antialias=False)
        for i, image in enumerate(images)
    ]
    # At its edge an enlarged crop shows some of the pixels beside it.
    inner = (..., slice(2, -2), slice(2, -2))
    assert largest_difference(cropped[inner], torch.stack(theirs)[inner]) <= 1
    assert len({int(each) for each in boxes.width}) > 5


def test_without_a_random_crop_the_whole_image_is_resized() -> None:
    images = photographs()
    theirs = tv.resize(images, [20, 20], interpolation=BILINEAR, antialias=False)
    assert largest_difference(augment(images, config(crop_size=20), seeded(1)), theirs) <= 1
    assert augment(images, config(crop_size=32), seeded(1)) is images
    features = torch.rand(4, 7, 1, 1, generator=seeded(1))  # of a frozen body, in place of images
    assert augment(features, config(), seeded(1)) is features


def test_a_box_that_never_fits_leaves_the_image_whole() -> None:
    images = torch.randint(256, (64, 1, 1, 8), dtype=torch.uint8, generator=seeded(1))
    assert torch.equal(augment(images, config(crop_area=0.99, crop_aspect=1), seeded(1)), images)
    assert torch.equal(augment(images, config(erase=1), seeded(1)), images)


def test_erased_boxes_are_distributed_as_in_torchvision_and_as_frequent_as_is_said() -> None:
    size = (40, 56)
    white = torch.full((DRAWS, 2, *size), 255, dtype=torch.uint8)
    erased = augment(white, config(erase=0.6), seeded(1)) == 0
    assert torch.equal(erased[:, 0], erased[:, 1])
    rows, columns = erased[:, 0].any(2), erased[:, 0].any(1)
    assert torch.equal(erased[:, 0], rows[:, :, None] & columns[:, None])
    hit = rows.any(1)
    assert abs(float(hit.double().mean()) - 0.6) < 5 * (0.6 * 0.4 / DRAWS) ** 0.5
    found = torch.stack([rows.byte().argmax(1), columns.byte().argmax(1), rows.sum(1), columns.sum(1)], 1)[hit]
    torch.manual_seed(0)
    transform = v2.RandomErasing(p=1, scale=ERASED_AREA)
    made = (transform.make_params([white[0]]) for _ in range(DRAWS))
    reference = figures([(p["i"], p["j"], p["h"], p["w"]) for p in made], size)
    for name, values in figures(found.tolist(), size).items():
        assert kolmogorov_smirnov(values, reference[name]) < 0.08, name  # fewer than 3000


def test_an_image_shrunk_much_is_an_average_of_all_its_pixels() -> None:
    stripes = torch.tensor([0, 0, 0, 200], dtype=torch.uint8).repeat(16).expand(1, 1, 64, 64)
    small = augment(stripes, config(crop_size=16), seeded(1))
    assert small.unique().tolist() == [50]
    noise = torch.randint(256, (3, 1, 64, 64), dtype=torch.uint8, generator=seeded(1))
    whole = torch.eye(3, dtype=torch.float64).repeat(3, 1, 1)
    whole[1, 0, 0] = whole[1, 1, 1] = 0.25  # the middle image, which is not shrunk, keeps its place among the others
    shrunk = geometry.resample(noise, whole, (16, 16))
    assert torch.equal(shrunk[[0, 2]], F.avg_pool2d(noise[[0, 2]].float(), 4).round())
    assert torch.equal(shrunk[1], noise[1, :, 24:40, 24:40].float())


# Maps of the plane


def test_moves_are_composed_into_one_exact_resampling() -> None:
    images = photographs()[:2]
    box = geometry.Boxes(*(torch.tensor([each] * 2) for each in (5, 9, 16, 16)), torch.tensor([True, True]))
    quarter = geometry.rotate(torch.tensor([90.0, 90.0], dtype=torch.float64), (16, 16))
    maps = geometry.crop(box, (32, 32)) @ geometry.mirror(torch.tensor([True, False])) @ quarter
    made = geometry.resample(images, maps, (16, 16)).byte()
    cropped = images[:, :, 5:21, 9:25]
    expected = torch.stack([cropped[0].flip(-1), cropped[1]]).rot90(1, (2, 3))
    assert torch.equal(made, expected)


def test_a_rotated_crop_shows_what_lies_beside_it_and_black_outside_the_whole_image() -> None:
    white = torch.full((1, 1, 32, 32), 255, dtype=torch.uint8)
    box = geometry.Boxes(*(torch.tensor([each]) for each in (8, 8, 16, 16)), torch.tensor([True]))
    eighth = geometry.rotate(torch.tensor([45.0], dtype=torch.float64), (16, 16))
    assert geometry.resample(white, geometry.crop(box, (32, 32)) @ eighth, (16, 16)).min() == 255
    assert geometry.resample(white, eighth, (32, 32))[0, 0, 0, 0] == 0


def inside(transform: Callable[[Tensor], Tensor], size: tuple[int, int]) -> Tensor:
    """Returns where a transform shows only what lies inside the old image."""
    return transform(torch.full((1, *size), 255, dtype=torch.uint8))[0] == 255


@pytest.mark.long
def test_rotations_have_torchvisions_pixels_and_distribution() -> None:
    images = photographs(16)[..., :28]
    degrees = 40 * (2 * torch.rand(16, dtype=torch.float64, generator=seeded(3)) - 1)
    for image, ours, angle in zip(images, augment(images, config(rotation=40), seeded(3)), degrees, strict=True):

        def rotated(of: Tensor, angle: float = float(angle)) -> Tensor:
            return tv.rotate(of, angle, interpolation=BILINEAR)

        where = inside(rotated, (32, 28))
        assert where.float().mean() > 0.6
        assert largest_difference(ours[:, where], rotated(image)[:, where]) <= 1
    ramp = torch.arange(32, dtype=torch.uint8).mul(8).expand(1, 1, 32, 32)
    ours = augment(ramp.expand(DRAWS, -1, -1, -1), config(rotation=40), seeded(1))[:, 0, 6, 20].double()
    torch.manual_seed(0)
    transform = v2.RandomRotation(40, interpolation=BILINEAR)
    assert kolmogorov_smirnov(ours, torch.stack([transform(ramp)[0, 0, 6, 20] for _ in range(DRAWS)]).double()) < 0.07


def test_mirror_images_and_shifts_are_as_frequent_with_a_resampling_as_without() -> None:
    ramp = torch.arange(64, dtype=torch.uint8).add(1).view(1, 1, 8, 8).expand(DRAWS, -1, -1, -1)
    plain = AugmentConfig(flip=True, shift=2)
    resampled = plain.model_copy(update={"rotation": 1e-9})
    counts = []
    for each in (plain, resampled):
        outcomes, count = augment(ramp, each, seeded(1)).flatten(1).unique(dim=0, return_counts=True)
        counts.append(dict(zip(map(tuple, outcomes.tolist()), count.tolist(), strict=True)))
    assert counts[0].keys() == counts[1].keys() and len(counts[0]) == 2 * 5 * 5
    assert all(abs(count - counts[1][outcome]) < 5 * (2 * count) ** 0.5 for outcome, count in counts[0].items())


# Colours

COLOURS: list[tuple[Callable[[Tensor, Tensor], Tensor], Callable[..., Tensor], list[float], int]] = [
    (colour.brightness, tv.adjust_brightness, [0.0, 0.01, 0.5, 1.0, 1.3, 1.99], 1),
    (colour.contrast, tv.adjust_contrast, [0.0, 0.01, 0.5, 1.0, 1.3, 1.99], 1),
    (colour.saturation, tv.adjust_saturation, [0.0, 0.01, 0.5, 1.0, 1.3, 1.99], 1),
    (colour.hue, tv.adjust_hue, [-0.5, -0.3, -0.01, 0.0, 0.1, 0.5], 1),
    (colour.sharpness, tv.adjust_sharpness, [0.0, 0.01, 0.5, 1.0, 1.3, 1.99], 1),
    (colour.posterize, lambda image, bits: tv.posterize(image, int(bits)), [8, 7, 5, 3, 2], 0),
    (colour.solarize, tv.solarize, [255.0, 254.9, 128.0, 8.5, 0.0], 0),
    (colour.autocontrast, lambda image, _: tv.autocontrast(image), [0], 1),
    (colour.equalize, lambda image, _: tv.equalize(image), [0], 0),
]


@pytest.mark.parametrize(
    ("ours", "theirs", "strengths", "tolerance", "channels"),
    [(*case, channels) for case in COLOURS for channels in (1, 3) if (case[0], channels) != (colour.hue, 1)],
)
def test_each_change_of_colour_gives_torchvisions_values(
    ours: Callable[[Tensor, Tensor], Tensor],
    theirs: Callable[..., Tensor],
    strengths: list[float],
    tolerance: int,
    channels: int,
) -> None:
    images = photographs(channels=channels)
    images[3] = 255 * (images[3] > 128)
    before = images.float()
    for strength in strengths:
        changed = ours(before, torch.full((len(images), 1, 1, 1), strength))
        assert (
            largest_difference(changed.round().byte(), torch.stack([theirs(i, strength) for i in images])) <= tolerance
        )
        assert changed.min() >= 0 and changed.max() <= 255
    # Each image has its own strength.
    own = torch.tensor([strengths[i % len(strengths)] for i in range(len(images))])
    changed = ours(before, own.view(-1, 1, 1, 1)).round().byte()
    expected = [theirs(image, float(strength)) for image, strength in zip(images, own, strict=True)]
    assert largest_difference(changed, torch.stack(expected)) <= tolerance
    assert torch.equal(before, images.float())


@pytest.mark.parametrize(
    "most",
    [
        {"brightness": 0.4},
        {"contrast": 0.6},
        {"saturation": 1.0},
        {"hue": 0.3},
        {"brightness": 0.3, "contrast": 0.3, "saturation": 0.5, "hue": 0.1},
    ],
    ids="-".join,
)
def test_colours_are_distributed_as_in_torchvision(most: dict[str, float]) -> None:
    image = torch.tensor([[200, 90], [60, 110], [40, 60]], dtype=torch.uint8).view(1, 3, 1, 2)

    def values(images: list[Tensor]) -> Tensor:
        return torch.cat(images)[:, :, 0, 0].double()

    def theirs(scale: float) -> Tensor:
        """Applies the factors that torchvision draws, in its orders; the values that they give are tested above."""
        transform = v2.ColorJitter(**{key: scale * value for key, value in most.items()})
        by_order = defaultdict(list)
        for _ in range(DRAWS):
            made = transform.make_params([])
            by_order[tuple(made.pop("fn_idx").tolist())].append(made)
        changed = []
        for order, rows in by_order.items():
            images = image.float().expand(len(rows), -1, -1, -1)
            for name in (list(rows[0])[place] for place in order):
                if rows[0][name] is not None:
                    change = getattr(colour, name.removesuffix("_factor"))
                    images = change(images, torch.tensor([row[name] for row in rows]).view(-1, 1, 1, 1))
            changed.append(images)
        return values(changed)

    torch.manual_seed(0)
    reference, another = theirs(1), theirs(0.5)
    # The order of the changes is drawn once per batch.
    ours = values([augment(image.expand(10, -1, -1, -1), config(**most), seeded(s)) for s in range(DRAWS // 10)])
    distances = [kolmogorov_smirnov(ours[:, c], reference[:, c]) for c in range(3)]
    assert max(distances) < 0.07
    assert max(kolmogorov_smirnov(ours[:, c], another[:, c]) for c in range(3)) > 0.07


# TrivialAugment

SPACE = v2.TrivialAugmentWide._AUGMENTATION_SPACE


def test_trivial_draws_each_operation_and_strength_of_torchvisions_list_as_often() -> None:
    assert list(trivial.OPERATIONS) == list(SPACE)
    draws = 60_000
    drawn = trivial.draw(draws, seeded(1))
    share = 1 / len(SPACE)
    for place, (name, (magnitudes, signed)) in enumerate(SPACE.items()):
        found = drawn.strength[drawn.operation == place]
        assert abs(len(found) / draws - share) < 5 * (share * (1 - share) / draws) ** 0.5, name
        listed = magnitudes(31, 32, 32)
        if listed is None:
            continue
        around = trivial.OPERATIONS[name].around
        expected = (torch.cat([listed, -listed]) if signed else listed) * UNIT.get(name, 1)
        found = (found - around).round(decimals=4)
        if name == "Posterize":
            found = found.round()
        values, frequency = (found + 0.0).unique(return_counts=True)
        theirs, weights = (expected.float().round(decimals=4) + 0.0).unique(return_counts=True)
        torch.testing.assert_close(values, theirs, atol=2e-4, rtol=0)
        chance = weights / weights.sum()
        assert ((frequency / len(found) - chance).abs() < 5 * (chance * (1 - chance) / len(found)).sqrt()).all(), name


@pytest.mark.parametrize("name", SPACE)
def test_each_operation_of_trivial_is_torchvisions(name: str) -> None:
    transform, images = v2.TrivialAugmentWide(interpolation=BILINEAR), photographs(4, size=40)
    operation = trivial.OPERATIONS[name]
    magnitudes, signed = SPACE[name]
    listed = [0.0] if (made := magnitudes(31, 40, 40)) is None else [float(m) for m in made[::6]]
    for magnitude in [*listed, *(-each for each in listed if signed)]:

        def theirs(image: Tensor, magnitude: float = magnitude) -> Tensor:
            return transform._apply_image_or_video_transform(  # type: ignore[no-any-return]
                image, name, magnitude, interpolation=BILINEAR, fill={Tensor: None}
            )

        place = torch.full((4,), list(SPACE).index(name))
        drawn = trivial.Drawn(place, torch.full((4,), operation.around + magnitude * UNIT.get(name, 1)))
        ours = trivial.change_colours(geometry.resample(images, trivial.maps(drawn, (40, 40)), (40, 40)), drawn)
        reference = torch.stack([theirs(image) for image in images])
        if operation.move:
            white = theirs(torch.full((1, 40, 40), 255, dtype=torch.uint8))[0]
            assert abs(magnitude) > 0.5 * abs(listed[-1]) or (white == 255).float().mean() > 0.5
            assert not ours[..., white == 0].any()
            ours, reference = ours[..., white == 255], reference[..., white == 255]
        assert largest_difference(ours.round().byte(), reference) <= 1


def test_trivial_applies_to_each_image_of_a_batch_what_was_drawn_for_it() -> None:
    images = photographs(40)
    made, drawn = augment(images, config(policy="trivial"), seeded(7)), trivial.draw(40, seeded(7))
    assert len(drawn.operation.unique()) > 10
    for i in range(40):
        alone = trivial.Drawn(drawn.operation[i : i + 1], drawn.strength[i : i + 1])
        moved = geometry.resample(images[i : i + 1], trivial.maps(alone, (32, 32)), (32, 32))
        assert torch.equal(made[i], trivial.change_colours(moved, alone).round().byte()[0])


# All of it


@pytest.mark.parametrize("channels", [1, 3])
def test_everything_at_once_is_a_function_of_the_seed_and_gives_bytes_of_the_crop_size(channels: int) -> None:
    keys = EVERYTHING | ({"saturation": 0, "hue": 0} if channels == 1 else {})
    images = photographs(32, channels)
    before = images.clone()
    made = augment(images, AugmentConfig(**keys), seeded(3))
    assert made.dtype == torch.uint8 and made.shape == (32, channels, 20, 20)
    assert torch.equal(made, augment(images, AugmentConfig(**keys), seeded(3)))
    assert not torch.equal(made, augment(images, AugmentConfig(**keys), seeded(4)))
    assert torch.equal(images, before)


def test_nothing_is_read_from_the_device() -> None:
    images = photographs(32)
    with NoReading():
        augment(images, AugmentConfig(**EVERYTHING), seeded(3))
