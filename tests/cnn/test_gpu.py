"""The CUDA path. Run with `pytest -m gpu` on a machine that has a GPU; it is not part of the default suite."""

import pytest
import torch

from cnn.config.training import AugmentConfig, TrainConfig
from cnn.distributed.process_group import make_deterministic, process_group
from cnn.networks.weights import weights_sha256
from cnn.training.augment import augment
from cnn.training.loop import fit
from cnn.training.reports import EpochReport, StepReport
from cnn.training.trainer import Trainer
from tests.cnn.conftest import Packed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device: run this on a GPU"),
]


class LastEpoch:
    def on_step(self, report: StepReport) -> None: ...

    def on_epoch(self, report: EpochReport) -> None:
        self.accuracy = report.val.accuracy


def test_augmentation_on_a_gpu_is_the_same_twice_and_nearly_that_of_the_cpu() -> None:
    make_deterministic()
    colours = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
    config = AugmentConfig(shift=0, crop_area=0.3, crop_size=24, rotation=20, erase=0.5, policy="trivial", **colours)
    images = torch.randint(256, (64, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    images = images.repeat_interleave(6, 2).repeat_interleave(6, 3)
    on_cpu = augment(images, config, torch.Generator().manual_seed(3))
    first, second = (augment(images.cuda(), config, torch.Generator("cuda").manual_seed(3)).cpu() for _ in range(2))
    assert torch.equal(first, second)
    # Where rounding moves a value over a threshold, as in `solarize`, it differs more.
    assert float(((first.int() - on_cpu.int()).abs() > 2).float().mean()) < 0.01


@pytest.mark.parametrize("model", ["notes", "convoy9"])
def test_training_on_a_gpu_learns_and_gives_equal_weights_twice(model: str, digits: Packed) -> None:
    make_deterministic()
    changes = AugmentConfig(flip=False, shift=1, cutout=2)
    config = TrainConfig(model=model, network={"dropout": 0.1}, epochs=20, batch_size=64, augment=changes)
    digests = []
    for _ in range(2):
        with process_group() as (device, exchange):
            assert device.type == "cuda"
            trainer = Trainer(
                config,
                manifest=digits.manifest,
                train_split=digits.split("train"),
                val_split=digits.split("val"),
                device=device,
                exchange=exchange,
            )
            fit(trainer, last := LastEpoch())
            digests.append(weights_sha256(trainer.network.state_dict()))
        assert last.accuracy > 0.8
    assert digests[0] == digests[1]
