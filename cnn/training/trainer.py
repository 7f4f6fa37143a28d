"""A network in training, and its training step."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from cnn.config.training import TrainConfig
from cnn.data.device_batches import device_batches
from cnn.data.manifest import Manifest
from cnn.data.mapped_split import MappedSplit
from cnn.data.split_reader import Batch, SplitReader
from cnn.distributed.lanes import Exchange, LaneParallel
from cnn.errors import InputError
from cnn.evaluation.evaluate import Score, evaluate
from cnn.networks.build import build
from cnn.networks.trial import check_network
from cnn.networks.weights import copy_to_host, load_pretrained
from cnn.networks.wrappers import Normalise, normalisation, predictor
from cnn.training.arithmetic import counted_operations
from cnn.training.augment import augment, mix
from cnn.training.features import Tail, compute_features, dropout_before_head, wants_features
from cnn.training.finetune import Freezing, check_finetuning, rate_factors
from cnn.training.optimizer import build_optimizer, set_learning_rate
from cnn.training.order import Order, check_sampling
from cnn.training.random_streams import generator, seed_default_generator, stream_seed
from cnn.training.schedule import average_decay, learning_rate
from cnn.training.step_clock import StepClock
from cnn.training.step_figures import StepFigures, StepReports


class NonFinite(RuntimeError):
    """The loss or the gradient became infinite or not a number; training again would give the same result.

    Attributes:
        step: the first such step, counted from 1; the weights are those before this step.
        lanes: the lanes with such a loss or gradient.
        samples: the images of these lanes, as positions in the training split.
    """

    exit_status, status = 1, "diverged"

    def __init__(self, message: str, *, step: int, lanes: list[int], samples: list[int]) -> None:
        super().__init__(message)
        self.step, self.lanes, self.samples = step, lanes, samples


def check_fits(config: TrainConfig, manifest: Manifest) -> None:
    """Checks whether a configuration can be trained on a dataset version, before anything is set up.

    Raises:
        InputError: a batch larger than the training split, an augmentation or a sampling that the images cannot have,
            or as `check_trainable`.
    """
    _check_images(config, manifest)
    check_trainable(config, channels=manifest.channels, image_size=manifest.image_size, classes=len(manifest.classes))


def check_trainable(config: TrainConfig, *, channels: int, image_size: int, classes: int) -> None:
    """Checks whether the network can be trained as configured on images C×H×W with H = W = `image_size`.

    Raises:
        InputError: the network cannot be trained on such images, be fine-tuned as `config.finetune` says, or take crops
            of `config.augment.crop_size`.
    """
    size = config.augment.crop_size or image_size
    if size > image_size:
        raise InputError(
            f"augment.crop_size={size} is larger than the images, whose sides have {image_size} pixels; set a smaller "
            "one, or a larger data.image_size"
        )
    with torch.random.fork_rng(devices=[]):
        network = check_network(config, channels=channels, image_size=image_size, classes=classes)
        images = torch.zeros(2, channels, image_size, image_size, device=next(network.parameters()).device)
        check_finetuning(config, network, images)
    if size == image_size:
        return
    try:
        with torch.no_grad():
            network.eval()(images[..., :size, :size])
    except (RuntimeError, AssertionError, ValueError) as error:
        raise InputError(
            f"{config.model}, made for images of {image_size} pixels, does not take crops of {size}; leave "
            "augment.crop_size unset, make it larger, or choose a network that takes images of any size, such as "
            "efficientnet_lite0"
        ) from error


def _check_images(config: TrainConfig, manifest: Manifest) -> None:
    """Checks what needs no network."""
    count = manifest.splits["train"].count
    if count < config.batch_size:
        per_lane = count // config.lanes
        smaller = f"set batch_size to at most {per_lane * config.lanes}, or " if per_lane > 1 else ""
        raise InputError(
            f"the training split has {count} images, fewer than a batch of {config.batch_size}; "
            f"{smaller}give more images"
        )
    check_sampling(config, manifest.splits["train"])
    augment = config.augment
    if manifest.channels == 1 and (augment.saturation or augment.hue):
        raise InputError(
            "augment.saturation and augment.hue change colours, and these images are grey; set both to 0, or "
            "data.channels=3"
        )


class Trainer:
    """A network in training: the parts of a step, and the progress.

    Each rank has one, and all ranks act equally: decisions that depend on figures are taken at the same step. Call
    `check_trainable` before: once will do, and with a large network it takes seconds.

    Args:
        pretrained: safetensors file of weights to start from, in place of new random weights.
        stop_requested: returns whether this rank wants to stop; called in each step. All ranks stop at the same step.

    Raises:
        InputError: ranks that cannot share the lanes, a batch larger than the training split, or an augmentation or a
            sampling that the images cannot have.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        manifest: Manifest,
        train_split: SplitReader,
        val_split: SplitReader,
        device: torch.device,
        exchange: Exchange,
        pretrained: Path | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        _check_images(config, manifest)
        self.config, self.device, self.exchange = config, device, exchange
        self.train_split, self.val_split = train_split, val_split
        self.step = 0
        self.order = Order(config, manifest.splits["train"], lambda: train_split.labels)
        self.steps_per_epoch = self.order.steps_per_epoch
        self.total_steps = config.epochs * self.steps_per_epoch
        self.classes = len(manifest.classes)
        self.normalise: nn.Module = Normalise(*normalisation(config, manifest)).to(device)
        torch.manual_seed(stream_seed(config.seed, "weights"))
        network = build(config, manifest)
        if pretrained:
            load_pretrained(network, pretrained)
        self.network = network.to(device).to(memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.network) if config.ema else None
        self._clock = StepClock(device)
        self._freezing = Freezing(config, self.network, steps_per_epoch=self.steps_per_epoch)
        self._rate_factors = rate_factors(config.finetune, self.network)
        self._trained_part: Callable[[nn.Module], nn.Module] = lambda network: network
        if wants_features(config, manifest, self.network):
            self._replace_images_by_features()
        self._prepare(frozen=self._freezing.holds(0), earlier={})
        self._class_weights = _class_weights(config, manifest.splits["train"].class_counts, device)
        self._batches: Iterator[Batch] | None = None  # of this rank's lanes, from this step on
        self._stop_requested = stop_requested
        self.history: list[Score] = []
        """The validation scores so far, of every epoch or as `validate_every` says."""

        self.best: dict[str, Tensor] = {}
        """The weights of the best epoch so far; empty unless the configuration selects these."""

        self._figures = StepFigures(config.lanes, exchange.world_size)
        self.reports = StepReports(self._figures, batch_size=config.batch_size, steps_per_epoch=self.steps_per_epoch)
        self._broken = torch.zeros((), device=device)
        self.operations_per_image = 0.0
        """Floating-point operations of a training step per image; 0 before the first step."""

    def _prepare(self, *, frozen: bool, earlier: Mapping[Tensor, Any]) -> None:
        """Makes what depends on which parameters are trained. All ranks call it together: DDP's constructor exchanges.

        Args:
            earlier: the optimizer's state so far, which parameters that are still trained keep.
        """
        self._frozen = frozen
        self._freezing.apply(frozen)
        self.optimizer = build_optimizer(self.config, self.network, self._rate_factors)
        self.optimizer.state.update({p: earlier[p] for p in self.optimizer.state if p in earlier})
        self.lanes = LaneParallel(
            self._trained_part(self.network),
            lanes=self.config.lanes,
            exchange=self.exchange,
            on_computed=self._clock.computed,
        )
        self._parameters = [p for p in self.network.parameters() if p.requires_grad]

    def _replace_images_by_features(self) -> None:
        """Computes what the frozen body gives for each image, for the head alone to be trained and validated on."""
        self._freezing.apply(frozen=True)
        dropout = dropout_before_head(self.network, self.normalise, self.train_split.shape)
        if dropout is None:
            return
        self.train_split, self.val_split = (
            MappedSplit([compute_features(self.network, self.normalise, split, self.exchange)])
            for split in (self.train_split, self.val_split)
        )
        self._trained_part, self.normalise = partial(Tail, dropout=dropout), nn.Identity()

    def prepare_for(self, step: int) -> None:
        """Freezes or unfreezes layers, if that changes with a step, counted from 0; all ranks call it together.

        After a step everything stays as it was in that step until the next one, so that a checkpoint between two steps
        has the optimizer's state of the first one.
        """
        if self._freezing.holds(step) != self._frozen:
            self._prepare(frozen=not self._frozen, earlier=self.optimizer.state)

    def train_step(self) -> None:
        """Runs one optimizer step on one global batch."""
        self.prepare_for(self.step)
        self._clock.start()
        if self._batches is None:
            orders = _orders(self.order, self.lanes.lanes_here, self.step, self.total_steps)
            self._batches = device_batches(self.train_split, orders, self.device)
        rate = learning_rate(self.config, self.step, self.total_steps)
        self.optimizer.zero_grad(set_to_none=True)
        lanes = self.lanes.lanes_here
        images, labels = (tensor.chunk(len(lanes)) for tensor in next(self._batches))
        self._clock.data_ready()
        for lane, *batch in zip(lanes, images, labels, strict=True):
            with _inexact_refused(self.config.model), self._counted():
                self.lanes.run(lane, partial(self._lane, step=self.step, lane=lane, batch=batch))
        figures = self.lanes.finish()
        self._clock.exchanged()
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = get_total_norm(gradients)
        if self.config.clip_norm:
            clip_grads_with_norm_(self._parameters, self.config.clip_norm, norm)
        # From the first step that is not finite, the optimizer changes no weights; nothing waits for its result.
        finite = (norm + figures[self._figures.losses].sum()).isfinite()
        self._broken = torch.maximum(self._broken, (~finite).float())
        self.optimizer.found_inf = self._broken  # type: ignore[attr-defined]  # read by all fused optimizers
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        if self.average is not None:
            _move_average(self.average, self.network, average_decay(self.config, self.step))
        self.step += 1
        self.reports.add(self.step, rate, torch.cat([figures, norm.double().view(1)]))

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or early stopping has ended the training."""
        if self.step == self.total_steps:
            return True
        ended = self._validated_epoch(len(self.history) - 1)
        patience = self.config.early_stopping
        return bool(patience and self.step == ended * self.steps_per_epoch and ended - self.best_epoch >= patience)

    @property
    def validates(self) -> bool:
        """Whether the last step ended an epoch after which the network is validated."""
        epoch, rest = divmod(self.step, self.steps_per_epoch)
        return rest == 0 and (epoch % self.config.validate_every == 0 or epoch == self.config.epochs)

    @property
    def best_epoch(self) -> int:
        """The first epoch with the best validation accuracy, counted from 1; 0 before the first validation."""
        return self._validated_epoch(self._best)

    @property
    def _best(self) -> int:
        """The place of the best score in the history; -1 before the first validation."""
        return max(range(len(self.history)), key=lambda place: (self.history[place].accuracy, -place), default=-1)

    def _validated_epoch(self, place: int) -> int:
        """Returns the epoch, counted from 1, of a place in the history; 0 for -1."""
        return min((place + 1) * self.config.validate_every, self.config.epochs)

    def validate(self) -> Score:
        """Computes the validation score of the current weights, and adds it to the history."""
        kept = self.average or self.network
        network = nn.Sequential(self.normalise, predictor(self._trained_part(kept), self.config))
        self.history.append(evaluate(network, self.val_split, self.device, self.exchange))
        if self.config.select == "best" and self._best == len(self.history) - 1:
            self.best = copy_to_host(kept.state_dict())
        return self.history[-1]

    def weights(self) -> dict[str, Tensor]:
        """Returns the weights to keep: those of the best epoch, the moving average, or the current ones."""
        return self.best or (self.average or self.network).state_dict()

    @property
    def selected(self) -> Score:
        """The validation score of `weights`."""
        return self.history[self._best if self.best else -1]

    def non_finite_error(self) -> NonFinite:
        """Repeats the first step that was not finite, lane by lane, and returns the error that names its lanes."""
        step = int(self.reports.broken_step)
        samples = self._samples(step - 1)
        bad = torch.zeros(self.config.lanes, dtype=torch.float64, device=self.device)
        for lane in self.lanes.lanes_here:
            self.optimizer.zero_grad(set_to_none=True)
            again = self.train_split.gather(samples[lane])
            loss, _ = self._lane(self._trained_part(self.network), step=step - 1, lane=lane, batch=again)
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

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Counts the operations of a lane, in the first step."""
        if self.operations_per_image:
            yield
            return
        with counted_operations(self.network) as operations:
            yield
        self.operations_per_image = operations.count / (self.config.batch_size / self.config.lanes)

    def _samples(self, step: int) -> Tensor:
        """Returns the images of a step, counted from 0: int64 lanes × images per lane, positions in the split."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        return self.order.epoch(epoch, range(self.config.lanes))[step_of_epoch]

    def _lane(self, network: nn.Module, *, step: int, lane: int, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Returns one lane's mean loss, and its part of the step's figures."""
        # A copy: where a lane's part of the step's memory begins depends on the ranks, and a kernel may compute other
        # bits from memory that is aligned otherwise.
        images, labels = (tensor.to(self.device, copy=True) for tensor in batch)
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
        correct = (logits.detach().argmax(1) == labels).sum()
        pack = partial(self._figures.pack, lane, loss=loss.detach(), correct=correct, rank=self.exchange.rank)
        if lane == self.lanes.lanes_here[0]:
            return loss, pack(vote=self._stop_requested(), times=self._clock.times())
        return loss, pack()


@contextmanager
def _inexact_refused(model: str) -> Iterator[None]:
    """Raises InputError if an operation of a network has no deterministic implementation on the device."""
    try:
        yield
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        raise InputError(
            f"{model} cannot be trained exactly on this device, for which PyTorch has no deterministic "
            f"{str(error).split()[0]}; train on a CPU, or choose another network"
        ) from error


def _orders(order: Order, lanes: range, step: int, total_steps: int) -> Iterator[Tensor]:
    """Yields per epoch, from a step on, the images of each step, lane after lane: int64 [steps, lanes · images].

    It is not a method, since a thread that reads ahead would then keep the trainer alive.
    """
    while step < total_steps:
        epoch, done = divmod(step, order.steps_per_epoch)
        yield order.epoch(epoch, lanes)[done:].flatten(1)
        step = (epoch + 1) * order.steps_per_epoch


def _class_weights(config: TrainConfig, class_counts: Sequence[int], device: torch.device) -> Tensor | None:
    """Returns images / (classes · images of the class), scikit-learn's `balanced`; the mean over images is 1."""
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
