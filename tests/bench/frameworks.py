"""Convoy against what else one would train with: 2 ranks of one thread each, on both sides.

The others read the same images, as tensors in memory, through a DataLoader; its workers are as many as turned out
fastest of `WORKERS`. See `rank_program` for their settings. On a busy machine the side with more processes gets a
larger share of the cores, so these ratios mean something on a quiet one only.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

from tests.bench.comparison import Comparison, compare, fastest, require
from tests.bench.data import packed_images
from tests.bench.training import STEPS
from tests.bench.turns import Job, ranks

WORKERS = (0, 1, 2)  # of each rank


def dataloader(rounds: int) -> Iterator[Comparison]:
    """Convoy against a plain DDP loop with DataLoader and torchvision's transforms for each image, at 2 ranks."""
    yield from _against("dataloader", "DDP and DataLoader", Job(program="loader_ddp"), rounds)


def lightning(rounds: int) -> Iterator[Comparison]:
    """Convoy against Lightning: its ddp strategy, DataLoader, torchvision's transforms for each image, at 2 ranks.

    Logger, checkpoints, progress bar and summary are off.
    """
    version = require("pytorch-lightning")
    yield from _against("lightning", f"Lightning {version}", Job(program="lightning", starts_ranks=True), rounds)


def accelerate(rounds: int) -> Iterator[Comparison]:
    """Convoy against Accelerate: DDP, DataLoader, torchvision's transforms for each image, at 2 ranks.

    Its ranks are started as by torchrun: `accelerate launch` starts no more than one on CPUs without MPI.
    """
    version = require("accelerate")
    yield from _against("accelerate", f"Accelerate {version}", Job(program="accelerate"), rounds)


def _against(name: str, label: str, job: Job, rounds: int) -> Iterator[Comparison]:
    for model, steps in STEPS.items():
        each = replace(job, model=model, steps=steps)
        with ExitStack() as stack:
            folder = stack.enter_context(packed_images())
            ours = stack.enter_context(ranks("Convoy", replace(each, program="convoy", starts_ranks=False), folder))
            theirs = [
                stack.enter_context(ranks(f"{label}, {workers} workers a rank", replace(each, workers=workers), folder))
                for workers in WORKERS
            ]
            yield compare(f"{name}: {model}", ours, fastest(theirs), rounds=rounds)
