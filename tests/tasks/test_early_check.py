"""What cannot be trained on images of a known size is refused before servers start."""

import pytest

from cnn.errors import InputError
from tasks.config.run import load_config
from tasks.training.early_check import check_early


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["finetune.freeze=layer9"], "finetune.freeze: resnet18 has no stage 'layer9'; it has conv1, layer1, layer2"),
        (["model=vit_b_32", "augment.crop_size=32"], "vit_b_32, made for images of 64 pixels, does not take crops of"),
        (["model=notes", "network.channels=[8,8,8,8,8,8]", "data.image_size=32"], "32×32 pixels are too small for not"),
    ],
)
def test_a_network_that_does_not_suit_the_images_or_the_configuration_is_refused_in_one_line(
    settings: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message) as refusal:
        check_early(load_config(None, ["dataset=photos/", "model=resnet18", "data.image_size=64", *settings]))
    assert "\n" not in str(refusal.value)
