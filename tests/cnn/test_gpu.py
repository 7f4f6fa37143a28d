"""The CUDA path. Run with `pytest -m gpu` on a machine that has a GPU; it is not part of the default suite."""

import pytest
import torch

from cnn.config.training import AugmentConfig, TrainConfig
from cnn.distributed.process_group import make_deterministic, process_group
from cnn.networks.weights import weights_sha256
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


@pytest.mark.parametrize("model", ["notes", "convoy9"])
def test_training_on_a_gpu_learns_and_gives_equal_weights_twice(model: str, digits: Packed) -> None:
    make_deterministic()
    augment = AugmentConfig(flip=False, shift=1, cutout=2)
    config = TrainConfig(model=model, network={"dropout": 0.1}, epochs=20, batch_size=64, augment=augment)
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
