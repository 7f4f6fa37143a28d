"""Convoy's training step against plain PyTorch: what data, augmentation, lanes and reports cost."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.nn import functional as F

from cnn.config.training import TrainConfig
from cnn.distributed.process_group import make_deterministic, process_group
from cnn.networks.build import build
from cnn.training.optimizer import build_optimizer
from cnn.training.trainer import Trainer
from tests.bench.comparison import Comparison, Side, compare, rate
from tests.bench.data import open_packed, packed_images
from tests.bench.rank_program import train_step
from tests.bench.turns import Job, ranks

STEPS = {"notes": 25, "convoy9": 10}  # a round; a few seconds on one core


def bare_loop(rounds: int) -> Iterator[Comparison]:
    """Convoy's training step against forward, backward and optimizer step on one batch that never leaves memory.

    Both: one process, one thread, channels_last, deterministic kernels, the same network, optimizer and batch size.
    Convoy also draws each image from the packed shards, shifts, flips and normalises it, runs the batch as four lanes,
    and reports.
    """
    make_deterministic()
    for model, steps in STEPS.items():
        yield _bare(model, steps, rounds)


def plain_ddp(rounds: int) -> Iterator[Comparison]:
    """Convoy's four lanes against plain DDP on the same packed images and batch augmentation, at 2 ranks.

    DDP has its own all-reduce, no buffer broadcast, gradients as views of the buckets, a static graph, and may use
    kernels that are not deterministic; each of its ranks runs its half batch at once.
    """
    yield from _two_ranks_against("lanes", "plain DDP, 2 ranks", Job(program="packed_ddp"), rounds)


def two_threads(rounds: int) -> Iterator[Comparison]:
    """Convoy on 2 ranks of one thread against a plain loop on one rank of 2 threads, on the same packed images."""
    yield from _two_ranks_against("ranks", "1 rank, 2 threads", Job(program="packed_ddp", ranks=1, threads=2), rounds)


def _two_ranks_against(name: str, label: str, job: Job, rounds: int) -> Iterator[Comparison]:
    for model, steps in STEPS.items():
        ours, theirs = (replace(each, model=model, steps=steps) for each in (Job(program="convoy"), job))
        with (
            packed_images() as folder,
            ranks("Convoy, 2 ranks", ours, folder) as our_side,
            ranks(label, theirs, folder) as their_side,
        ):
            yield compare(f"{name}: {model}", our_side, their_side, rounds=rounds)


def _bare(model: str, steps: int, rounds: int) -> Comparison:
    config = TrainConfig(model=model)
    with packed_images() as folder, process_group() as (device, exchange):
        manifest, train = open_packed(folder)
        trainer = Trainer(
            config, manifest=manifest, train_split=train, val_split=train, device=device, exchange=exchange
        )
        network = build(config, manifest).to(memory_format=torch.channels_last)
        optimizer = build_optimizer(config, network)
        images, labels = train.slice(0, config.batch_size)
        images = trainer.normalise(images)

        def our_step() -> float:
            train_step(trainer)
            return config.batch_size

        def bare_step() -> float:
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(network(images), labels, label_smoothing=config.label_smoothing)
            loss.backward()
            optimizer.step()
            return config.batch_size

        ours, theirs = (rate(step, calls=steps) for step in (our_step, bare_step))
        return compare(f"bare: {model}", Side("Convoy", ours), Side("bare loop", theirs), rounds=rounds)
