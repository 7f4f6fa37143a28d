"""The training loop learns real digits, reports what it does, and stops at a loss that is no number."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from cnn.config.training import TrainConfig
from cnn.data.manifest import SplitInfo
from cnn.data.shard_writer import ShardWriter
from cnn.distributed.lanes import Exchange
from cnn.errors import InputError
from cnn.networks.weights import weights_sha256
from cnn.training.loop import fit
from cnn.training.reports import EpochReport, StepReport
from cnn.training.schedule import learning_rate
from cnn.training.trainer import NonFinite, Trainer, check_fits
from tests.cnn.conftest import Packed, joined_group

SMALL = {"channels": [8], "kernel_sizes": [3], "strides": [1], "hidden": [32]}
NOTES: dict[str, Any] = {"model": "notes", "network": SMALL | {"dropout": 0.1}}
CONVOY9: dict[str, Any] = {"model": "convoy9", "network": {"width": 8}}
MUON = {"optimizer": "muon"}
OPTIMIZERS: dict[str, dict[str, float]] = {
    "sgd": {"lr": 0.05},
    "adam": {"lr": 0.01, "weight_decay": 1e-4},
    "adamw": {"lr": 0.01, "weight_decay": 0.01},
    "muon": {"lr": 0.05},
}
FLOOR = 0.85  # validation accuracy; they reach 0.94 to 1


@pytest.fixture(scope="module")
def group() -> Iterator[tuple[torch.device, Exchange]]:
    with joined_group() as joined:
        yield joined


class History:
    """Keeps all reports."""

    def __init__(self) -> None:
        self.steps: list[StepReport] = []
        self.epochs: list[EpochReport] = []

    def on_step(self, report: StepReport) -> None:
        self.steps.append(report)

    def on_epoch(self, report: EpochReport) -> None:
        self.epochs.append(report)

    def after_step(self, trainer: Trainer, *, milestone: bool) -> None: ...


class Lab:
    """Trains on digits in this process, by one rank."""

    def __init__(self, digits: Packed, group: tuple[torch.device, Exchange]) -> None:
        self._digits, self._group = digits, group

    def trainer(self, **keys: Any) -> Trainer:
        defaults = {"epochs": 1, "batch_size": 64, "augment": {"flip": False, "shift": 1}, **NOTES}
        device, exchange = self._group
        return Trainer(
            TrainConfig.model_validate(defaults | keys),
            manifest=self._digits.manifest,
            train_split=self._digits.split("train"),
            val_split=self._digits.split("val"),
            device=device,
            exchange=exchange,
        )

    def train(self, **keys: Any) -> tuple[Trainer, History]:
        trainer, history = self.trainer(**keys), History()
        fit(trainer, history)
        return trainer, history


@pytest.fixture
def lab(digits: Packed, group: tuple[torch.device, Exchange]) -> Lab:
    return Lab(digits, group)


@pytest.mark.long
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("network", [NOTES, CONVOY9], ids=["notes", "convoy9"])
def test_each_network_learns_with_each_optimizer(lab: Lab, network: dict[str, Any], optimizer: str) -> None:
    plain = {"epochs": 4, "lanes": 2, "label_smoothing": 0.0, "augment": {"flip": False, "shift": 0}}
    _, history = lab.train(optimizer=optimizer, **plain, **network, **OPTIMIZERS[optimizer])
    first, last = history.steps[0], history.steps[-1]
    assert last.loss < first.loss / 3
    assert history.epochs[-1].val.loss < history.epochs[0].val.loss
    assert history.epochs[-1].val.accuracy > FLOOR


def enlarged(digits: Packed, folder: Path) -> Packed:
    """The digits with 16×16 pixels."""

    def packed_again(name: str, info: SplitInfo) -> SplitInfo:
        writer = ShardWriter(folder, (1, 16, 16))
        images, labels = digits.split(name).slice(0, info.count)
        writer.add(images.repeat_interleave(2, 2).repeat_interleave(2, 3).numpy(), labels.numpy())
        return info.model_copy(update={"shards": writer.close()})

    splits = {name: packed_again(name, info) for name, info in digits.manifest.splits.items()}
    return Packed(folder, digits.manifest.model_copy(update={"splits": splits, "image_size": 16}))


@pytest.mark.long
def test_a_network_trained_on_crops_is_validated_on_whole_images(
    digits: Packed, group: tuple[torch.device, Exchange], tmp_path: Path
) -> None:
    lab = Lab(enlarged(digits, tmp_path), group)
    crops = {"flip": False, "shift": 0, "crop_area": 0.8, "crop_size": 12}
    trainer = lab.trainer(epochs=4, lanes=2, lr=0.05, label_smoothing=0, augment=crops, **CONVOY9)
    sizes = set()
    trainer.network.register_forward_hook(
        lambda network, inputs, _: sizes.add((network.training, inputs[0].shape[2:]))  # type: ignore[func-returns-value]
    )
    fit(trainer, history := History())
    assert sizes == {(True, (12, 12)), (False, (16, 16))}
    assert sum(step.accuracy for step in history.steps[-10:]) / 10 > FLOOR
    assert history.epochs[-1].val.accuracy > 0.3  # in whole images, the digits are a third larger: 0.53


@pytest.mark.parametrize(
    ("augment", "network", "message"),
    [
        ({"crop_size": 9}, CONVOY9, "augment.crop_size=9 is larger than the images, whose sides have 8 pixels"),
        ({"crop_size": 7}, NOTES, "notes, made for images of 8 pixels, does not take crops of 7"),
        ({"crop_size": 7}, CONVOY9, "convoy9, made for images of 8 pixels, does not take crops of 7"),
        ({"hue": 0.1}, CONVOY9, "change colours, and these images are grey; set both to 0, or data.channels=3"),
        ({"saturation": 0.1}, NOTES, "change colours, and these images are grey"),
    ],
)
def test_augmentation_that_does_not_fit_is_refused_in_one_line(
    digits: Packed, augment: dict[str, Any], network: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as refusal:
        check_fits(TrainConfig.model_validate({"augment": augment, **network}), digits.manifest)
    assert "\n" not in str(refusal.value)


def test_rare_classes_are_drawn_as_often_as_others_and_the_resumed_order_is_the_same(lab: Lab, digits: Packed) -> None:
    trainer = lab.trainer(sampling="balanced")
    labels = digits.split("train").labels
    drawn = torch.cat([labels[trainer._samples(step).flatten()] for step in range(trainer.steps_per_epoch)])
    assert torch.bincount(drawn).tolist() == [len(drawn) // 10 + (label < len(drawn) % 10) for label in range(10)]
    assert torch.equal(trainer._samples(30), lab.trainer(sampling="balanced", lr=0.01)._samples(30))


def test_every_step_and_every_epoch_is_reported_once_with_its_learning_rate(lab: Lab) -> None:
    trainer, history = lab.train(epochs=2)
    per_epoch = 1372 // 64
    assert trainer.steps_per_epoch == per_epoch
    assert trainer.step == trainer.total_steps == 2 * per_epoch
    assert [report.step for report in history.steps] == list(range(1, 2 * per_epoch + 1))
    assert [(report.epoch, report.step) for report in history.epochs] == [(1, per_epoch), (2, 2 * per_epoch)]
    expected = [learning_rate(trainer.config, step, trainer.total_steps) for step in range(trainer.total_steps)]
    assert [report.learning_rate for report in history.steps] == expected


def test_first_reported_loss_is_the_untrained_networks_mean_cross_entropy(lab: Lab) -> None:
    keys: dict[str, Any] = {
        "augment": {"flip": False, "shift": 0},
        "label_smoothing": 0.1,
        "network": SMALL | {"dropout": 0},
    }
    reference = lab.trainer(**keys)
    images, labels = reference.train_split.gather(reference._samples(0).flatten())
    with torch.no_grad():
        logits = reference.network(reference.normalise(images))
    trainer = lab.trainer(**keys)
    trainer.train_step()
    (report,) = trainer.reports.until(1)
    assert report.loss == pytest.approx(float(F.cross_entropy(logits, labels, label_smoothing=0.1)))
    assert report.accuracy == int((logits.argmax(1) == labels).sum()) / 64


@pytest.mark.long
def test_label_smoothing_keeps_the_training_loss_up_but_not_the_validation_loss_formula(lab: Lab) -> None:
    plain, smoothed = (lab.train(epochs=3, label_smoothing=smoothing)[1] for smoothing in (0.0, 0.3))
    # The least loss with smoothing s over K classes is the entropy of the smoothed target.
    target = [1 - 0.3 + 0.03] + [0.03] * 9
    least = -sum(share * math.log(share) for share in target)
    assert min(report.loss for report in smoothed.steps) > least
    assert min(report.loss for report in plain.steps) < least


def test_balanced_class_weights_are_one_on_the_average_and_equal_for_each_class_in_sum(lab: Lab) -> None:
    trainer = lab.trainer(class_weights="balanced")
    weights = trainer._class_weights
    assert weights is not None
    labels = trainer.train_split.labels
    assert float(weights[labels].mean()) == pytest.approx(1)
    shares = torch.bincount(labels, weights=weights[labels].double())
    assert shares.tolist() == pytest.approx([len(labels) / 10] * 10)
    assert lab.trainer(class_weights="none")._class_weights is None


def test_class_weights_change_what_is_learnt(lab: Lab) -> None:
    digests = {weights_sha256(lab.train(class_weights=kind)[0].network.state_dict()) for kind in ("none", "balanced")}
    assert len(digests) == 2


def test_weights_are_a_function_of_the_configuration(lab: Lab) -> None:
    once, again = (weights_sha256(lab.train(**CONVOY9)[0].network.state_dict()) for _ in range(2))
    assert once == again


@pytest.mark.parametrize("network", [NOTES, CONVOY9, CONVOY9 | MUON], ids=["notes", "convoy9", "muon"])
def test_figures_that_are_not_finite_stop_training_and_leave_the_weights_of_the_step_before(
    lab: Lab, network: dict[str, Any]
) -> None:
    history = History()
    keys = network | {"epochs": 20, "lr": 100.0, "schedule": "constant", "weight_decay": 1.0}
    trainer = lab.trainer(**keys)
    with pytest.raises(NonFinite, match=r"^the loss or its gradient is not finite at step \d+, in lane \d") as stop:
        fit(trainer, history)
    assert "\n" not in str(stop.value)
    assert all(math.isfinite(report.loss) for report in history.steps)
    assert [report.step for report in history.steps] == list(range(1, stop.value.step))
    assert trainer.step > stop.value.step - 1
    again = lab.trainer(**keys)
    for _ in range(stop.value.step - 1):
        again.train_step()
    weights = {name: tensor for name, tensor in again.network.named_parameters()}
    assert all(torch.equal(weights[name], tensor) for name, tensor in trainer.network.named_parameters())


def test_the_lane_and_the_images_that_are_not_finite_are_named(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = lab.trainer(lanes=4)
    poisoned = int(trainer._samples(3)[2][5])
    gather = type(trainer.train_split).gather

    def gather_with_a_bad_image(split: Any, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = gather(split, index)
        return torch.where((index == poisoned).view(-1, 1, 1, 1), torch.nan, images.float()), labels

    monkeypatch.setattr("cnn.training.trainer.augment", lambda images, *_: images)
    monkeypatch.setattr(type(trainer.train_split), "gather", gather_with_a_bad_image)
    with pytest.raises(NonFinite, match=f"at step 4, in lane 2 .*training images .*{poisoned}") as stop:
        fit(trainer, History())
    assert (stop.value.step, stop.value.lanes) == (4, [2])
    assert stop.value.samples == trainer._samples(3)[2].tolist()


def test_a_network_without_a_deterministic_backward_pass_is_refused_in_one_line(lab: Lab) -> None:
    """As torchvision's AlexNet and VGG are on a GPU; the error's text is PyTorch's."""

    def fail(*_: object) -> None:
        raise RuntimeError(
            "adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation, but you set\n'torch"
        )

    trainer = lab.trainer()
    trainer.network.register_full_backward_pre_hook(fail)
    with pytest.raises(InputError) as refusal:
        trainer.train_step()
    assert str(refusal.value) == (
        "notes cannot be trained exactly on this device, for which PyTorch has no deterministic "
        "adaptive_avg_pool2d_backward_cuda; train on a CPU, or choose another network"
    )


@pytest.mark.long
def test_early_stopping_and_best_epoch_keep_the_weights_of_the_best(lab: Lab) -> None:
    keys = {"epochs": 30, "early_stopping": 2, "select": "best", "lr": 0.3, **CONVOY9}
    trainer, history = lab.train(**keys)
    accuracies = [report.val.accuracy for report in history.epochs]
    best = accuracies.index(max(accuracies)) + 1
    assert len(accuracies) == best + 2 < 30
    assert (trainer.best_epoch, trainer.selected) == (best, history.epochs[best - 1].val)
    # The schedule is that of all the epochs, so fewer steps of it end in the same place.
    again = lab.trainer(**keys)
    while again.step < best * again.steps_per_epoch:
        again.train_step()
    assert weights_sha256(trainer.weights()) == weights_sha256(again.network.state_dict())


@pytest.mark.long
def test_only_some_epochs_are_validated_and_the_last_and_early_stopping_counts_epochs(lab: Lab) -> None:
    trainer, history = lab.train(epochs=5, validate_every=2, **CONVOY9)
    assert [report.epoch for report in history.epochs] == [2, 4, 5]
    every, reports = lab.train(epochs=5, **CONVOY9)
    assert [reports.epochs[epoch - 1] for epoch in (2, 4, 5)] == history.epochs
    assert weights_sha256(trainer.weights()) == weights_sha256(every.weights())
    keys = {"epochs": 30, "early_stopping": 4, "select": "best", "lr": 0.3, "validate_every": 2, **CONVOY9}
    trainer, history = lab.train(**keys)
    accuracies = {report.epoch: report.val.accuracy for report in history.epochs}
    assert trainer.best_epoch == max(accuracies, key=lambda epoch: (accuracies[epoch], -epoch))
    assert trainer.selected.accuracy == max(accuracies.values())
    assert trainer.step // trainer.steps_per_epoch == trainer.best_epoch + 4 < 30


@pytest.mark.long
def test_moving_average_lags_behind_the_weights_and_is_what_is_kept(lab: Lab) -> None:
    trainer, history = lab.train(epochs=5, ema=0.8, **CONVOY9)
    assert trainer.average is not None
    assert weights_sha256(trainer.weights()) == weights_sha256(trainer.average.state_dict())
    kept, last = (module.state_dict()["linear.weight"] for module in (trainer.average, trainer.network))
    assert not torch.equal(kept, last)
    assert history.epochs[-1].val.accuracy > FLOOR


def test_clipping_bounds_the_step_but_not_the_reported_norm(lab: Lab) -> None:
    plain = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "lr": 1.0, "schedule": "constant"}
    trainer = lab.trainer(clip_norm=0.01, **plain)
    before = [parameter.clone() for parameter in trainer.network.parameters()]
    trainer.train_step()
    (report,) = trainer.reports.until(1)
    moved = torch.cat(
        [(a - b).detach().flatten() for a, b in zip(before, trainer.network.parameters(), strict=True)]
    ).norm()
    assert report.gradient_norm > 0.1
    assert float(moved) == pytest.approx(0.01, rel=1e-3)


def test_rank_seconds_are_reported(lab: Lab) -> None:
    _, history = lab.train()
    (seconds,) = history.steps[-1].rank_seconds
    assert 0 < seconds < 10


def test_a_batch_larger_than_the_training_split_is_refused_with_the_largest_that_fits(lab: Lab) -> None:
    with pytest.raises(
        InputError, match=r"has 1372 images, fewer than a batch of 2048; set batch_size to at most 1372, or give more"
    ):
        lab.trainer(batch_size=2048)
    with pytest.raises(InputError, match=r"has 1372 images, fewer than a batch of 2048; give more images$"):
        lab.trainer(batch_size=2048, lanes=1024)  # two images per lane are the fewest


def test_images_too_small_for_the_network_are_refused(lab: Lab) -> None:
    with pytest.raises(InputError, match="8×8 pixels are too small for notes"):
        lab.trainer(network=SMALL | {"channels": [8, 8, 8]})
