"""The picture of augmented images shows what the trainer gives to the network."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ImageDraw
from torch import Tensor, nn

from cnn.config.training import TrainConfig
from cnn.training.order import Order
from cnn.training.trainer import Trainer
from tasks.reporting.drawing import TITLE, Section, gallery
from tasks.training.augmented_sheet import SHOWN, augmented_sheet, first_step
from tests.cnn.conftest import Packed, digits, joined_group  # noqa: F401
from tests.tasks.galleries import as_tile, height_of, tile

CPU = torch.device("cpu")
ALL = {"flip": True, "shift": 2, "cutout": 3}
OFF = {"flip": False, "shift": 0, "cutout": 0}


def configuration(augment: dict[str, Any], **keys: Any) -> TrainConfig:
    return TrainConfig.model_validate({"network": {"width": 4}, "batch_size": 64, "augment": augment, **keys})


@pytest.mark.parametrize(
    ("augment", "keys"),
    [
        pytest.param(ALL, {}, id="flip, shift and cutout"),
        pytest.param(ALL | {"mixup": 0.4}, {"lanes": 2}, id="mixup"),
        pytest.param(ALL | {"mixup": 1.0, "cutmix": 1.0}, {"seed": 5}, id="mixup or cutmix"),
        pytest.param(ALL, {"shuffle_window": 128, "lanes": 2}, id="a window"),
        pytest.param({"crop_area": 0.4, "flip": True}, {"sampling": "balanced"}, id="crops, balanced"),
    ],
)
def test_images_are_those_that_the_network_gets_in_its_first_step(
    digits: Packed,  # noqa: F811
    augment: dict[str, Any],
    keys: dict[str, Any],
) -> None:
    config, manifest = configuration(augment, **keys), digits.manifest
    got: list[Tensor] = []

    def keep(_network: nn.Module, inputs: tuple[Tensor]) -> None:
        got.append(inputs[0].clone())

    with joined_group() as (device, exchange):
        trainer = Trainer(
            config,
            manifest=manifest,
            train_split=digits.split("train"),
            val_split=digits.split("val"),
            device=device,
            exchange=exchange,
        )
        trainer.network.register_forward_pre_hook(keep)
        trainer.train_step()
    found = list(first_step(config, manifest, digits.split("train"), CPU, range(config.lanes)))
    assert len(found) == len(got) == config.lanes
    mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in (manifest.mean, manifest.std))
    labels = digits.split("train").labels
    order = Order(config, manifest.splits["train"], lambda: labels).epoch(0, range(config.lanes))[0]
    for (images, augmented, targets), inputs, index in zip(found, got, order, strict=True):
        assert torch.equal(images, digits.split("train").gather(index)[0])
        assert not torch.equal(images, augmented)
        assert float((augmented - 255 * (inputs * std + mean)).abs().max()) <= 0.501  # it is rounded
        assert torch.allclose(targets.sum(1), torch.ones(len(targets)))


def test_sheet_has_originals_above_and_their_classes_as_titles(
    digits: Packed,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    titles: list[str] = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "multiline_text", lambda _, place, text, *__: titles.append(text))
    config, train = configuration(ALL), digits.split("train")
    picture = augmented_sheet(config, digits.manifest, train, CPU)
    assert picture.height == TITLE + height_of(SHOWN, pairs=True)
    for lane, (images, augmented, targets) in enumerate(first_step(config, digits.manifest, train, CPU, range(4))):
        for place in range(8):
            number = 8 * lane + place
            assert np.array_equal(tile(picture, number, pair=False), as_tile(images[place]))
            assert np.array_equal(tile(picture, number, pair=True), as_tile(augmented[place]))
            assert titles[number] == digits.manifest.classes[int(targets[place].argmax())]

    titles.clear()
    augmented_sheet(configuration(OFF | {"mixup": 1.0}), digits.manifest, train, CPU)
    assert len(titles) == SHOWN
    assert any(re.fullmatch(r"\d \d+%\n\d \d+%", title) for title in titles)  # two classes and their shares


def test_what_is_off_changes_no_image(digits: Packed) -> None:  # noqa: F811
    assert configuration(OFF).augment.is_off
    assert not any(configuration(OFF | {key: value}).augment.is_off for key, value in {**ALL, "mixup": 0.1}.items())
    for images, augmented, _ in first_step(configuration(OFF), digits.manifest, digits.split("train"), CPU, range(4)):
        assert torch.equal(images, augmented)


def test_more_lanes_than_rows_and_images_of_two_sizes_are_drawn(digits: Packed) -> None:  # noqa: F811
    many = augmented_sheet(configuration(ALL, lanes=16), digits.manifest, digits.split("train"), CPU)
    assert many.height == TITLE + height_of(4 * 4, pairs=True)  # four images per lane
    upper, lower = torch.full((1, 1, 12, 12), 10, dtype=torch.uint8), torch.full((1, 3, 8, 8), 20, dtype=torch.uint8)
    picture = gallery([Section("", upper, [""], lower)])
    assert (tile(picture, 0, pair=False) == 10).all() and (tile(picture, 0, pair=True) == 20).all()
