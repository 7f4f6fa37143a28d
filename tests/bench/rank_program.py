"""The program of every rank that trains in a benchmark: rank_program.py FOLDER JOB (see `turns`).

All train the job's network, optimizer and batch size, on the same packed images, in channels_last; they differ in what
is around that. Those that are not Convoy's keep a constant learning rate and count nothing, which is in their favour.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from cnn.data.manifest import Manifest
from cnn.data.mapped_split import MappedSplit
from cnn.distributed.process_group import make_deterministic, process_group
from cnn.networks.build import build
from cnn.networks.wrappers import Normalise
from cnn.training.augment import augment
from cnn.training.loop import REPORT_DELAY_STEPS
from cnn.training.optimizer import build_optimizer
from cnn.training.random_streams import epoch_order, generator
from cnn.training.trainer import Trainer
from infra.machine.lifeline import die_with_parent
from tests.bench.comparison import keep_memory
from tests.bench.data import open_packed
from tests.bench.turns import ADDRESS, Job, Turns

CPU = torch.device("cpu")


def convoy(job: Job, manifest: Manifest, train: MappedSplit) -> None:
    """Convoy's trainer, as `fit` runs it between validations."""
    make_deterministic()
    with process_group(_store(job)) as (device, exchange):
        trainer = Trainer(
            job.config, manifest=manifest, train_split=train, val_split=train, device=device, exchange=exchange
        )
        turns = Turns(job.steps)
        more = True
        while more:
            train_step(trainer)
            more = turns.step_done()


def train_step(trainer: Trainer) -> None:
    """A step, and what `fit` reads of the steps before it."""
    trainer.train_step()
    list(trainer.reports.until(trainer.step - REPORT_DELAY_STEPS))


def packed_ddp(job: Job, manifest: Manifest, train: MappedSplit) -> None:
    """A plain loop on Convoy's packed images and batch augmentation: no lanes, DDP's own all-reduce."""
    _plain_loop(job, manifest, _packed_batches(job, train))


def loader_ddp(job: Job, manifest: Manifest, train: MappedSplit) -> None:
    """A plain loop on a DataLoader."""
    loader = _loader(job, train, sharded=True)
    _plain_loop(job, manifest, _batches(loader))


def lightning(job: Job, manifest: Manifest, train: MappedSplit) -> None:
    """Lightning's Trainer; its `ddp` strategy starts the second rank and shards the loader."""
    import pytorch_lightning
    from pytorch_lightning.strategies import DDPStrategy

    class Module(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = _network(job, manifest)
            self.normalise = Normalise(manifest.mean, manifest.std)

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            return _loss(job, self.network, self.normalise, *batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return build_optimizer(job.config, self.network)

    class TakeTurns(pytorch_lightning.Callback):
        def on_train_start(self, trainer: pytorch_lightning.Trainer, *_: object) -> None:
            assert trainer.world_size == job.ranks
            self.turns = Turns(job.steps)

        def on_train_batch_end(self, trainer: pytorch_lightning.Trainer, *_: object) -> None:
            trainer.should_stop = not self.turns.step_done()

    on_gpus = torch.cuda.is_available()
    pytorch_lightning.Trainer(
        accelerator="gpu" if on_gpus else "cpu",
        devices=job.ranks,
        strategy=DDPStrategy(process_group_backend="nccl" if on_gpus else "gloo", **DDP_OPTIONS),
        callbacks=[TakeTurns()],
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Module(), _loader(job, train))


def accelerate(job: Job, manifest: Manifest, train: MappedSplit) -> None:
    """A loop with Accelerate's `prepare` and `backward`."""
    from accelerate import Accelerator, DistributedDataParallelKwargs

    dist.init_process_group("gloo", store=_store(job), rank=_rank(), world_size=job.ranks)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(**DDP_OPTIONS)])
    assert accelerator.num_processes == job.ranks
    network, normalise = _network(job, manifest), Normalise(manifest.mean, manifest.std)
    optimizer = build_optimizer(job.config, network)
    network, optimizer, loader = accelerator.prepare(network, optimizer, _loader(job, train))
    turns = Turns(job.steps)
    for images, labels in _batches(loader):
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(_loss(job, network, normalise, images, labels))
        optimizer.step()
        if not turns.step_done():
            break
    accelerator.end_training()


PROGRAMS = {program.__name__: program for program in (convoy, packed_ddp, loader_ddp, lightning, accelerate)}

DDP_OPTIONS = {"broadcast_buffers": False, "gradient_as_bucket_view": True, "static_graph": True}
"""What makes DDP fast for a network that is the same in every step; batch norm stays each rank's own."""


def _plain_loop(job: Job, manifest: Manifest, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
    network, normalise = _network(job, manifest), Normalise(manifest.mean, manifest.std)
    optimizer = build_optimizer(job.config, network)
    if job.ranks > 1:
        dist.init_process_group("gloo", store=_store(job), rank=_rank(), world_size=job.ranks)
        network = DistributedDataParallel(network, **DDP_OPTIONS)
    turns = Turns(job.steps)
    for images, labels in batches:
        optimizer.zero_grad(set_to_none=True)
        _loss(job, network, normalise, images, labels).backward()
        optimizer.step()
        if not turns.step_done():
            break
    if job.ranks > 1:
        dist.destroy_process_group()


def _network(job: Job, manifest: Manifest) -> nn.Module:
    torch.manual_seed(0)
    return build(job.config, manifest).to(memory_format=torch.channels_last)


def _loss(job: Job, network: nn.Module, normalise: Normalise, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(network(normalise(images)), labels, label_smoothing=job.config.label_smoothing)


def _packed_batches(job: Job, train: MappedSplit) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's part of each global batch: gathered and augmented at once."""
    size, config = job.config.batch_size, job.config
    random = generator(CPU, "augment", _rank())
    for epoch in range(sys.maxsize):
        order = epoch_order(config.seed, epoch, len(train))
        for batch in order[: len(order) // size * size].split(size):
            images, labels = train.gather(batch.chunk(job.ranks)[_rank()])
            yield augment(images, config.augment, random), labels


class _Samples(Dataset[tuple[Tensor, int]]):
    """Convoy's default augmentation by torchvision's transforms, an image at a time.

    On uint8 tensors, which is faster than on Pillow's images; the batch is normalised later, which is faster too.
    """

    def __init__(self, job: Job, train: MappedSplit) -> None:
        from torchvision.transforms import v2

        self._images, self._labels = train.slice(0, len(train))
        crop = v2.RandomCrop(self._images.shape[-1], padding=job.config.augment.shift)
        self._transform = v2.Compose([crop, v2.RandomHorizontalFlip()])

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(self._images[index]), int(self._labels[index])


def _loader(job: Job, train: MappedSplit, *, sharded: bool = False) -> DataLoader[tuple[Tensor, int]]:
    """A DataLoader of this rank's batches; `sharded` if no framework makes it skip the other ranks' images."""
    samples = _Samples(job, train)
    return DataLoader(
        samples,
        batch_size=job.config.batch_size // job.ranks,
        shuffle=not sharded,
        sampler=DistributedSampler(samples, job.ranks, _rank()) if sharded else None,
        num_workers=job.workers,
        persistent_workers=job.workers > 0,
        drop_last=True,
        pin_memory=torch.cuda.is_available(),
    )


def _batches(loader: DataLoader[tuple[Tensor, int]]) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from loader


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _store(job: Job) -> dist.Store:
    return dist.FileStore(os.environ[ADDRESS] + "-meeting", job.ranks)


def main() -> None:
    die_with_parent(os.getppid())
    keep_memory()
    job = Job(**json.loads(sys.argv[2]))
    torch.set_num_threads(job.threads)
    PROGRAMS[job.program](job, *open_packed(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
