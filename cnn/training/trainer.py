"""The training loop."""

import copy
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from cnn.config.training import TrainConfig
from cnn.data.manifest import Manifest
from cnn.data.split_reader import Batch, SplitReader
from cnn.distributed.lanes import Exchange, LaneParallel
from cnn.errors import InputError
from cnn.evaluation.evaluate import Score, evaluate
from cnn.networks.build import build_network
from cnn.networks.weights import load_pretrained
from cnn.networks.wrappers import Normalise, predictor
from cnn.training.augment import augment, mix
from cnn.training.compute_clock import ComputeClock
from cnn.training.optimizer import build_optimizer, set_learning_rate
from cnn.training.order import Order
from cnn.training.random_streams import generator, seed_default_generator, stream_seed
from cnn.training.reports import EpochReport, StepReport
from cnn.training.schedule import average_decay, learning_rate

STEPS_LATE = 2  # figures are acted on this many steps after they were computed, so that nothing waits for a GPU
REPORTS_AN_EPOCH = 50  # at most some more; each is the mean of equally many steps


class NonFinite(RuntimeError):
    """The loss or the gradient became infinite or not a number; training again would do the same.

    Attributes:
        step: the first such step, counted from 1; the weights are those before it.
        lanes: the lanes that are to blame.
        samples: their images, as positions in the training split.
    """

    exit_status = 1

    def __init__(self, message: str, *, step: int, lanes: list[int], samples: list[int]) -> None:
        super().__init__(message)
        self.step, self.lanes, self.samples = step, lanes, samples


@dataclass(frozen=True)
class _Figures:
    """One step's figures, perhaps still on their way from the device."""

    step: int
    learning_rate: float
    values: Tensor
    copied: torch.cuda.Event | None

    def read(self) -> list[float]:
        if self.copied:
            self.copied.synchronize()
        values: list[float] = self.values.tolist()
        return values


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
    with torch.random.fork_rng(devices=[]):  # the device "meta" would load torch.compile, which takes seconds
        build(config, manifest)


def build(config: TrainConfig, manifest: Manifest) -> nn.Module:
    """The network that a configuration names, for the images and classes of a dataset version."""
    return build_network(
        config, channels=manifest.channels, image_size=manifest.image_size, classes=len(manifest.classes)
    )


class Trainer:
    """A network in training: what a step needs, and how far it has come.

    Every rank has one, and all do the same: whatever is decided from figures is decided at the same step.

    Args:
        config: how to train.
        manifest: of the dataset version: classes, image shape, mean and std.
        train, val: readers of its splits.
        device: of this rank.
        exchange: between the ranks.
        pretrained: safetensors file of weights to start from, in place of fresh ones.
        stop_requested: whether this rank wants to stop soon; asked at each step, all ranks stop at the same one.

    Raises:
        InputError: ranks that cannot share the lanes, a batch larger than the training split, or images too small
            for the network.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        manifest: Manifest,
        train: SplitReader,
        val: SplitReader,
        device: torch.device,
        exchange: Exchange,
        pretrained: Path | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        check_fits(config, manifest)
        self.config, self.train_split, self.val_split, self.device, self.exchange = config, train, val, device, exchange
        self.step = 0
        self.order = Order(config, manifest.splits["train"])
        self.steps_per_epoch = self.order.steps_per_epoch
        self.total_steps = config.epochs * self.steps_per_epoch
        self.report_every = max(1, self.steps_per_epoch // REPORTS_AN_EPOCH)
        self.classes = len(manifest.classes)
        self.normalise = Normalise(manifest.mean, manifest.std).to(device)
        torch.manual_seed(stream_seed(config.seed, "weights"))
        network = build(config, manifest)
        if pretrained:
            load_pretrained(network, pretrained)
        self.network = network.to(device).to(memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.network) if config.ema else None
        self.optimizer = build_optimizer(config, self.network)
        self._clock = ComputeClock(device)
        self.lanes = LaneParallel(self.network, lanes=config.lanes, exchange=exchange, on_computed=self._clock.stop)
        self._parameters = [p for p in self.network.parameters() if p.requires_grad]
        self._class_weights = _class_weights(config, manifest.splits["train"].class_counts, device)
        self._batches: Iterator[Batch] | None = None  # of the lanes here, from this step on
        self._stop_requested = stop_requested
        self.history: list[Score] = []
        """What the validation split said after each epoch."""

        self._best: dict[str, Tensor] = {}
        self._in_flight: deque[_Figures] = deque()
        self._recent: list[list[float]] = []  # of the report to come: loss, accuracy, gradient norm, learning rate
        self._recent_seconds: list[list[float]] = []
        self._vote_step = self._broken_step = math.inf  # first step with a vote, with figures that are not finite
        self._broken = torch.zeros((), device=device)

    def train_step(self) -> None:
        """One optimizer step on one global batch."""
        self._clock.start()
        if self._batches is None:
            orders = _orders(self.order, self.lanes.lanes_here, self.step, self.total_steps)
            self._batches = self.train_split.batches(orders)
        rate = learning_rate(self.config, self.step, self.total_steps)
        self.optimizer.zero_grad(set_to_none=True)
        for lane in self.lanes.lanes_here:
            self.lanes.run(lane, partial(self._lane, step=self.step, lane=lane, batches=self._batches))
        figures = self.lanes.finish()
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = get_total_norm(gradients)
        if self.config.clip_norm:
            clip_grads_with_norm_(self._parameters, self.config.clip_norm, norm)
        # From the first step on that is not finite the optimizer leaves the weights alone, without being waited for.
        finite = (norm + figures[: self.config.lanes].sum()).isfinite()
        self._broken = torch.maximum(self._broken, (~finite).float())
        self.optimizer.found_inf = self._broken  # type: ignore[attr-defined]  # read by all fused optimizers
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        if self.average is not None:
            _move_average(self.average, self.network, average_decay(self.config, self.step))
        self.step += 1
        self._in_flight.append(_Figures(self.step, rate, *_to_host(torch.cat([figures, norm.double().view(1)]))))

    def reports(self, *, until: int) -> Iterator[StepReport]:
        """Reports that are complete with the figures of the steps up to and including `until`."""
        lanes, ranks = self.config.lanes, self.exchange.world_size
        while self._in_flight and self._in_flight[0].step <= until and math.isinf(self._broken_step):
            figures = self._in_flight.popleft()
            values = figures.read()
            losses, (correct, votes, *seconds, norm) = values[:lanes], values[lanes:]
            loss = sum(losses) / lanes
            if not math.isfinite(loss + norm):
                self._broken_step = figures.step
                return  # what came later is worth nothing
            if votes:
                self._vote_step = min(self._vote_step, figures.step)
            self._recent.append([loss, correct / self.config.batch_size, norm, figures.learning_rate])
            assert len(seconds) == ranks
            if all(seconds):
                self._recent_seconds.append(seconds)
            in_epoch = figures.step % self.steps_per_epoch
            if in_epoch % self.report_every == 0:  # the last report of an epoch may be shorter
                yield self._report(figures.step)

    def is_broken(self, until: int) -> bool:
        """Whether a step up to `until` gave a loss or gradient that is not finite, as far as `reports` has read."""
        return self._broken_step <= until

    def stop_agreed(self, until: int) -> bool:
        """Whether any rank had voted to stop by the step `until`, as far as `reports` has read."""
        return self._vote_step <= until

    @property
    def finished(self) -> bool:
        """All steps are done, or early stopping has ended it."""
        if self.step == self.total_steps:
            return True
        at_epoch_end = len(self.history) * self.steps_per_epoch == self.step
        patience = self.config.early_stopping
        return bool(patience and at_epoch_end and len(self.history) - self.best_epoch >= patience)

    @property
    def best_epoch(self) -> int:
        """The first epoch with the best validation accuracy, counted from 1; 0 before there is one."""
        return max(range(len(self.history)), key=lambda e: (self.history[e].accuracy, -e)) + 1 if self.history else 0

    def validate(self) -> Score:
        """Score the validation split, and remember it as this epoch's."""
        kept = self.average or self.network
        network = nn.Sequential(self.normalise, predictor(kept, self.config))
        self.history.append(evaluate(network, self.val_split, self.device, self.exchange))
        if self.config.select == "best" and self.best_epoch == len(self.history):
            self._best = _copy(kept.state_dict())
        return self.history[-1]

    def weights(self) -> dict[str, Tensor]:
        """The weights that this training is for: the best epoch's, the moving average, or simply the last."""
        return self._best or (self.average or self.network).state_dict()

    @property
    def selected(self) -> Score:
        """What the validation split said of `weights`."""
        return self.history[self.best_epoch - 1 if self._best else -1]

    def state(self) -> dict[str, Tensor]:
        """All that later steps depend on, by name: copies in host memory. The figures of all steps must be read."""
        assert not self._in_flight
        progress = {
            "progress/step": torch.tensor(self.step),
            "progress/history": torch.tensor([[s.loss, s.accuracy] for s in self.history], dtype=torch.float64),
            "progress/recent": torch.tensor(self._recent, dtype=torch.float64),
        }
        return _copy(self._tensors()) | {f"best/{name}": tensor for name, tensor in self._best.items()} | progress

    def restore(self, state: Mapping[str, Tensor] | None) -> None:
        """Go on from where the first rank's `state` was taken; nothing changes if that is None.

        Every rank calls it. What the others give is not used: they get the first rank's tensors.

        Raises:
            InputError: it is the state of another training.
        """
        header = torch.zeros(4)
        if state is not None:
            self._check(state)
            has_best = any(name.startswith("best/") for name in state)
            header = torch.tensor([1, len(state["progress/history"]), len(state["progress/recent"]), has_best])
        present, epochs, recent, with_best = (int(value) for value in self._from_first(header.double()).tolist())
        if not present:
            return
        ours = self._tensors()
        best = {f"best/{name}": tensor for name, tensor in self.network.state_dict().items()} if with_best else {}
        wanted = {
            **ours,
            **best,
            "progress/step": torch.tensor(0),
            "progress/history": torch.zeros(epochs, 2, dtype=torch.float64),
            "progress/recent": torch.zeros(recent, 4, dtype=torch.float64),
        }
        got = {name: self._from_first(like if state is None else state[name]) for name, like in wanted.items()}
        with torch.no_grad():
            for name, tensor in ours.items():
                tensor.copy_(got[name])
        self.step = int(got["progress/step"])
        self._batches = None
        self.history = [Score(loss=loss, accuracy=accuracy) for loss, accuracy in got["progress/history"].tolist()]
        self._recent = got["progress/recent"].tolist()
        self._best = {name.removeprefix("best/"): got[name].cpu() for name in best}

    def _check(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in self._tensors().items():
            if name not in state or state[name].shape != tensor.shape or state[name].dtype != tensor.dtype:
                raise InputError(f"this is no checkpoint of this training: its {name} is missing or does not fit")

    def _from_first(self, tensor: Tensor) -> Tensor:
        """The first rank's tensor, on every rank; a copy."""
        copied = tensor.detach().to(self.device, copy=True).contiguous()
        if self.exchange.world_size > 1:
            dist.broadcast(copied, src=0)
        return copied

    def blame(self) -> NonFinite:
        """Find out which lanes of the first step that was not finite are to blame, by doing it again lane by lane."""
        step = int(self._broken_step)
        samples = self._samples(step - 1)
        bad = torch.zeros(self.config.lanes, dtype=torch.float64, device=self.device)
        for lane in self.lanes.lanes_here:
            self.optimizer.zero_grad(set_to_none=True)
            again = self.train_split.gather(samples[lane])
            loss, _ = self._lane(self.network, step=step - 1, lane=lane, batches=iter([again]))
            loss.backward()  # type: ignore[no-untyped-call]
            norm = get_total_norm([p.grad for p in self._parameters if p.grad is not None])
            bad[lane] = ~(norm + loss).isfinite()
        lanes = self.exchange.submit(bad).wait().nonzero().flatten().tolist()
        images = [int(i) for lane in lanes for i in samples[lane]]
        where = f"lane {', '.join(map(str, lanes))}" if lanes else "the sum of all lanes"
        few = ", ".join(map(str, images[:8])) + (f" and {len(images) - 8} more" if len(images) > 8 else "")
        return NonFinite(
            f"the loss or its gradient is not finite at step {step}, in {where} (learning rate "
            f"{learning_rate(self.config, step - 1, self.total_steps):.3g}); training images {few or 'of the batch'}; "
            "a lower lr, a longer warmup or clip_norm usually helps",
            step=step,
            lanes=lanes,
            samples=images,
        )

    def _samples(self, step: int) -> Tensor:
        """The images of a step, counted from 0: int64 lanes × images a lane, positions in the training split."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        return self.order.epoch(epoch, range(self.config.lanes))[step_of_epoch]

    def _lane(self, network: nn.Module, *, step: int, lane: int, batches: Iterator[Batch]) -> tuple[Tensor, Tensor]:
        """One lane's mean loss, and its part of the step's figures.

        The figures, float64: the loss of each lane; correct images; votes to stop; compute seconds of each rank.
        """
        images, labels = next(batches)
        if self.device.type == "cuda":
            images, labels = images.pin_memory(), labels.pin_memory()
        images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        random = generator(self.device, self.config.seed, "augment", step, lane)
        images = self.normalise(augment(images, self.config.augment, random))
        images, targets = mix(images, labels, self.classes, self.config.augment, random)
        seed_default_generator(self.device, self.config.seed, "dropout", step, lane)
        bfloat16 = self.config.precision == "bfloat16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bfloat16):
            logits = network(images)
        logits = logits.float()
        losses = F.cross_entropy(
            logits,
            targets,
            weight=self._class_weights,
            label_smoothing=self.config.label_smoothing,
            reduction="none",
        )
        loss = losses.mean()  # not cross_entropy's own mean, which would weigh lanes by their classes
        lanes, first = self.config.lanes, self.lanes.lanes_here[0]
        figures = torch.zeros(lanes + 2 + self.exchange.world_size, dtype=torch.float64)
        if lane == first:
            figures[lanes + 1] = self._stop_requested()
            figures[lanes + 2 + self.exchange.rank] = self._clock.seconds()
        figures = figures.to(self.device, non_blocking=True)
        figures[lane] = loss.detach()
        figures[lanes] = (logits.detach().argmax(1) == labels).sum()
        return loss, figures

    def _report(self, step: int) -> StepReport:
        loss, accuracy, norm, _ = (_mean(column) for column in zip(*self._recent, strict=True))
        report = StepReport(
            step=step,
            steps=len(self._recent),
            loss=loss,
            accuracy=accuracy,
            gradient_norm=norm,
            learning_rate=self._recent[-1][3],
            rank_seconds=tuple(_mean(column) for column in zip(*self._recent_seconds, strict=True)),
        )
        self._recent.clear()
        self._recent_seconds.clear()
        return report

    def _tensors(self) -> dict[str, Tensor]:
        """The live tensors of network, optimizer and moving average, by name."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.network.named_parameters()}
        tensors = {f"network/{name}": tensor for name, tensor in self.network.state_dict().items()}
        for parameter, state in self.optimizer.state.items():
            tensors |= {f"optimizer/{names[parameter]}/{key}": value for key, value in state.items()}
        if self.average is not None:
            tensors |= {f"average/{name}": tensor for name, tensor in self.average.state_dict().items()}
        return tensors


class Reporter(Protocol):
    """Is told how a training goes."""

    def on_step(self, report: StepReport) -> None: ...

    def on_epoch(self, report: EpochReport) -> None: ...

    def after_step(self, trainer: Trainer, *, milestone: bool) -> None:
        """A good moment to keep `trainer.state()`; a `milestone` is an epoch's end, or the last step before a stop."""
        ...


def fit(trainer: Trainer, reporter: Reporter) -> bool:
    """Train to the last step, or to the step at which the ranks agree to stop; returns whether it is finished.

    Raises:
        NonFinite: a loss or gradient was infinite or not a number.
    """
    while not trainer.finished:
        trainer.train_step()
        epoch_ends = trainer.step % trainer.steps_per_epoch == 0
        settled = trainer.step if epoch_ends else trainer.step - STEPS_LATE
        for report in trainer.reports(until=settled):
            reporter.on_step(report)
        if trainer.is_broken(settled):
            raise trainer.blame()
        if epoch_ends:
            epoch = trainer.step // trainer.steps_per_epoch
            reporter.on_epoch(EpochReport(epoch=epoch, step=trainer.step, val=trainer.validate()))
        stopping = trainer.stop_agreed(settled)
        reporter.after_step(trainer, milestone=epoch_ends or stopping)
        if stopping:
            return trainer.finished
    return True


def _orders(order: Order, lanes: range, step: int, total_steps: int) -> Iterator[Tensor]:
    """For each epoch from a step on the images of its steps, lane after lane: int64 [steps · lanes, images].

    No method of the trainer, which a thread that reads ahead would keep alive.
    """
    while step < total_steps:
        epoch, done = divmod(step, order.steps_per_epoch)
        yield order.epoch(epoch, lanes)[done:].flatten(0, 1)
        step = (epoch + 1) * order.steps_per_epoch


def _class_weights(config: TrainConfig, class_counts: Sequence[int], device: torch.device) -> Tensor | None:
    """`balanced`: images / (classes · images of the class), scikit-learn's definition; its mean over images is 1."""
    if config.class_weights == "none":
        return None
    counts = torch.tensor(class_counts)
    return (int(counts.sum()) / (len(counts) * counts.clamp_min(1))).float().to(device)


@torch.no_grad()
def _move_average(average: nn.Module, network: nn.Module, decay: float) -> None:
    pairs = list(zip(average.state_dict().values(), network.state_dict().values(), strict=True))
    floats = [pair for pair in pairs if pair[0].is_floating_point()]
    torch._foreach_lerp_([a for a, _ in floats], [n for _, n in floats], 1 - decay)
    for ours, theirs in pairs:
        if not ours.is_floating_point():
            ours.copy_(theirs)


def _to_host(figures: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    if not figures.is_cuda:
        return figures, None
    host = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True).copy_(figures, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()
    return host, copied


def _copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)
