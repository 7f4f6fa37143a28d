"""The training loop."""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnn.augment import Normalise, augment
from cnn.config import TrainConfig
from cnn.errors import InputError
from cnn.evaluate import Score, evaluate
from cnn.lanes import Exchange, LaneParallel
from cnn.manifest import Manifest
from cnn.networks import build_network
from cnn.optim import build_optimizer, set_learning_rate
from cnn.packed import PackedSplit
from cnn.schedule import learning_rate
from cnn.streams import epoch_order, generator, seed_default_generator, stream_seed

STEPS_LATE = 2  # figures are read this many steps after they were computed, so that nothing waits for a GPU


class NonFiniteLoss(RuntimeError):
    """The loss became infinite or not a number; training again would do the same."""

    exit_status = 1


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one step over a global batch found. `step` counts from 1; `accuracy` is that of the augmented images."""

    step: int
    loss: float
    accuracy: float
    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class EpochReport:
    """What the validation split says after an epoch. `epoch` and `step` count from 1."""

    epoch: int
    step: int
    val: Score


class Reporter(Protocol):
    """Is told how a training goes; on every rank, with the same values."""

    def on_step(self, report: StepReport) -> None: ...

    def on_epoch(self, report: EpochReport) -> None: ...


def check_fits(config: TrainConfig, manifest: Manifest) -> None:
    """Refuse what cannot be trained on a dataset version, before anything is set up for it.

    Raises:
        InputError: a batch larger than the training split, or images too small for the network.
    """
    count = manifest.splits["train"].count
    if count < config.batch_size:
        raise InputError(
            f"the training split has {count} images, fewer than a batch of {config.batch_size}; "
            f"set batch_size to at most {count // config.lanes * config.lanes}, or give more images"
        )
    with torch.device("meta"):
        _network(config, manifest)


def _network(config: TrainConfig, manifest: Manifest) -> nn.Module:
    return build_network(
        config, channels=manifest.channels, image_size=manifest.image_size, classes=len(manifest.classes)
    )


class Trainer:
    """A network in training: what a step needs, and how far it has come.

    Args:
        config: how to train.
        manifest: of the dataset version: classes, image shape, mean and std.
        train, val: its packed splits.
        device: of this rank.
        exchange: between the ranks.

    Raises:
        InputError: ranks that cannot share the lanes, a batch larger than the training split, or images too small
            for the network.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        manifest: Manifest,
        train: PackedSplit,
        val: PackedSplit,
        device: torch.device,
        exchange: Exchange,
    ) -> None:
        self.config, self.train, self.val, self.device, self.exchange = config, train, val, device, exchange
        check_fits(config, manifest)
        self.step = 0
        self.steps_per_epoch = len(train) // config.batch_size
        self.total_steps = config.epochs * self.steps_per_epoch
        self.normalise = Normalise(manifest.mean, manifest.std).to(device)
        torch.manual_seed(stream_seed(config.seed, "weights"))
        self.network = _network(config, manifest).to(device).to(memory_format=torch.channels_last)
        self.optimizer = build_optimizer(config, self.network)
        self.lanes = LaneParallel(self.network, lanes=config.lanes, exchange=exchange)
        self._class_weights = _class_weights(config, train.labels, len(manifest.classes), device)
        self._order = epoch_order(config.seed, 0, len(train))
        self._in_flight: deque[tuple[int, float, Tensor, torch.cuda.Event | None]] = deque()

    def train_step(self) -> None:
        """One optimizer step on one global batch."""
        epoch, batch = divmod(self.step, self.steps_per_epoch)
        if batch == 0:
            self._order = epoch_order(self.config.seed, epoch, len(self.train))
        size = self.config.batch_size
        samples = self._order[batch * size : (batch + 1) * size].view(self.config.lanes, -1)
        rate = learning_rate(self.config, self.step, self.total_steps)

        self.optimizer.zero_grad(set_to_none=True)
        for lane in self.lanes.lanes_here:
            images, labels = self._lane_batch(samples[lane], lane)

            def forward(network: nn.Module, images: Tensor = images, labels: Tensor = labels) -> tuple[Tensor, Tensor]:
                logits = network(images)
                loss = self._loss(logits, labels)
                correct = (logits.detach().argmax(1) == labels).sum()
                return loss, torch.stack([loss.detach().double(), correct.double()])

            self.lanes.run(lane, forward)
        figures = self.lanes.finish()
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.step += 1
        self._in_flight.append((self.step, rate, *_to_host(figures)))

    def reports(self, *, all_steps: bool = False) -> Iterator[StepReport]:
        """Reports of steps whose figures have arrived; with `all_steps` wait for the last ones too.

        Raises:
            NonFiniteLoss: a step's loss was infinite or not a number.
        """
        while len(self._in_flight) > (0 if all_steps else STEPS_LATE):
            step, rate, figures, copied = self._in_flight.popleft()
            if copied:
                copied.synchronize()
            loss, correct = figures.tolist()
            if not math.isfinite(loss):
                raise NonFiniteLoss(
                    f"the loss became {loss} at step {step} (learning rate {rate:.3g}); "
                    "a lower lr or a longer warmup usually helps"
                )
            yield StepReport(
                step=step,
                loss=loss / self.config.lanes,
                accuracy=correct / self.config.batch_size,
                learning_rate=rate,
            )

    def validate(self) -> Score:
        """Score the validation split."""
        return evaluate(nn.Sequential(self.normalise, self.network), self.val, self.device, self.exchange)

    def _lane_batch(self, index: Tensor, lane: int) -> tuple[Tensor, Tensor]:
        """The lane's images, augmented and normalised, and labels, on the device; its random streams are set."""
        images, labels = self.train.gather(index)
        if self.device.type == "cuda":
            images, labels = images.pin_memory(), labels.pin_memory()
        images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        random = generator(self.device, self.config.seed, "augment", self.step, lane)
        images = self.normalise(augment(images, self.config.augment, random))
        seed_default_generator(self.device, self.config.seed, "dropout", self.step, lane)
        return images, labels

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        smoothing = self.config.label_smoothing
        losses = F.cross_entropy(
            logits, labels, weight=self._class_weights, label_smoothing=smoothing, reduction="none"
        )
        return losses.mean()  # not cross_entropy's own mean, which would weigh lanes by their classes


def fit(trainer: Trainer, reporter: Reporter) -> None:
    """Train to the last step, reporting on the way.

    Raises:
        NonFiniteLoss: see `Trainer.reports`.
    """
    while trainer.step < trainer.total_steps:
        trainer.train_step()
        epoch_ends = trainer.step % trainer.steps_per_epoch == 0
        for report in trainer.reports(all_steps=epoch_ends):
            reporter.on_step(report)
        if epoch_ends:
            epoch = trainer.step // trainer.steps_per_epoch
            reporter.on_epoch(EpochReport(epoch=epoch, step=trainer.step, val=trainer.validate()))


def _class_weights(config: TrainConfig, labels: Tensor, classes: int, device: torch.device) -> Tensor | None:
    """`balanced`: images / (classes · images of the class), scikit-learn's definition; its mean over images is 1."""
    if config.class_weights == "none":
        return None
    counts = torch.bincount(labels, minlength=classes).clamp_min(1)
    return (len(labels) / (classes * counts)).float().to(device)


def _to_host(figures: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    if not figures.is_cuda:
        return figures, None
    host = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True).copy_(figures, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()
    return host, copied
