"""Convoy's training on one GPU against loops that do less: images per second, share of the peak, time of the host."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnn.config.training import TrainConfig
from cnn.data.device_batches import resident_batches
from cnn.data.manifest import Manifest
from cnn.data.mapped_split import MappedSplit
from cnn.distributed.process_group import make_deterministic, process_group
from cnn.networks.build import build
from cnn.networks.wrappers import Normalise
from cnn.training.arithmetic import peak
from cnn.training.augment import augment
from cnn.training.optimizer import build_optimizer
from cnn.training.random_streams import epoch_order, generator
from cnn.training.trainer import Trainer
from tests.bench.comparison import Comparison, LeftOut, Side, compare, require
from tests.bench.data import open_packed, packed_images
from tests.bench.rank_program import train_step
from tests.bench.turns import Job, ranks

CASES = {"convoy9": (28, 60_000, 200), "resnet18": (32, 50_000, 100), "resnet50": (224, 2_000, 30)}
"""Size and number of the images, and steps of a round."""

LANES = (1, 4)


@dataclass
class Loop:
    """Steps of a training, timed until the device has done them and until the host has asked for them."""

    step: Callable[[], object]
    images: int
    """Per step."""

    steps: int
    host_ms: list[float] = field(default_factory=list)
    """Of a step, round by round."""

    def measure(self) -> float:
        """Returns images per second."""
        _synchronize()
        began = time.perf_counter()
        for _ in range(self.steps):
            self.step()
        self.host_ms.append((time.perf_counter() - began) / self.steps * 1000)
        _synchronize()
        return self.images * self.steps / (time.perf_counter() - began)


def gpu(rounds: int) -> Iterator[Comparison]:
    """Convoy on one GPU, with one and with four lanes, against a bare loop, a loop on resident data, and Lightning.

    Both loops are one process with the same network, fused optimizer, batch size and float32 arithmetic, deterministic
    kernels and channels_last. The bare one trains on one batch; the other gathers, augments and normalises on the GPU.
    """
    if not torch.cuda.is_available():
        raise LeftOut("PyTorch sees no GPU")
    for model, (size, images, steps) in CASES.items():
        yield from on_device(model, size=size, images=images, steps=steps, rounds=rounds)
    label = f"Lightning {require('pytorch-lightning')}, 4 workers"
    for model, (size, images, steps) in CASES.items():
        job = Job(program="convoy", model=model, ranks=1, steps=steps)
        with (
            packed_images(images, size) as folder,
            ranks("Convoy, lanes=4", job, folder) as ours,
            ranks(label, replace(job, program="lightning", workers=4), folder) as theirs,
        ):
            yield compare(f"gpu: {model}", ours, theirs, rounds=rounds)


def on_device(model: str, *, size: int, images: int, steps: int, rounds: int) -> Iterator[Comparison]:
    """Compares one network on this process's device."""
    make_deterministic()
    with packed_images(images, size) as folder, process_group() as (device, exchange):
        manifest, train = open_packed(folder)
        for lanes in LANES:
            config = TrainConfig(model=model, lanes=lanes)
            trainer = Trainer(
                config, manifest=manifest, train_split=train, val_split=train, device=device, exchange=exchange
            )
            ours = Loop(lambda trainer=trainer: train_step(trainer), config.batch_size, steps)  # type: ignore[misc]
            others = {"bare loop": _bare, "resident data": _resident}
            for label, make in others.items():
                theirs = Loop(make(config, manifest, train, device), config.batch_size, steps)
                sides = Side(f"Convoy, lanes={lanes}", ours.measure), Side(label, theirs.measure)
                found = compare(f"gpu: {model}", *sides, rounds=rounds)
                yield found
                share = trainer.operations_per_image / peak(device)
                yield replace(
                    found,
                    unit="of the peak",
                    ours=tuple(figure * share for figure in found.ours),
                    theirs=tuple(figure * share for figure in found.theirs),
                )
                host = {"ours": tuple(ours.host_ms[-rounds:]), "theirs": tuple(theirs.host_ms[-rounds:])}
                yield replace(found, unit="ms of the host per step", **host)


def _bare(config: TrainConfig, manifest: Manifest, train: MappedSplit, device: torch.device) -> Callable[[], object]:
    images, labels = train.slice(0, config.batch_size)
    normalise = Normalise(manifest.mean, manifest.std).to(device)
    batch = normalise(images.to(device)), labels.to(device)
    network, optimizer = _network(config, manifest, device)
    return lambda: _step(config, network, optimizer, *batch)


def _resident(
    config: TrainConfig, manifest: Manifest, train: MappedSplit, device: torch.device
) -> Callable[[], object]:
    def orders() -> Iterator[Tensor]:
        for epoch in range(1_000_000):
            order = epoch_order(config.seed, epoch, len(train))
            yield order[: len(order) // config.batch_size * config.batch_size].view(-1, config.batch_size)

    batches = resident_batches(train, orders(), device)
    normalise, random = Normalise(manifest.mean, manifest.std).to(device), generator(device, "augment")
    network, optimizer = _network(config, manifest, device)

    def step() -> None:
        images, labels = next(batches)
        _step(config, network, optimizer, normalise(augment(images, config.augment, random)), labels)

    return step


def _network(config: TrainConfig, manifest: Manifest, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    network = build(config, manifest).to(device).to(memory_format=torch.channels_last)
    return network, build_optimizer(config, network)


def _step(
    config: TrainConfig, network: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> None:
    optimizer.zero_grad(set_to_none=True)
    F.cross_entropy(network(images), labels, label_smoothing=config.label_smoothing).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
