"""Training throughput: what data, augmentation, lanes and reports cost."""

import tempfile
from pathlib import Path

import torch
from torch.nn import functional as F

from cnn.config import PreprocessConfig, TrainConfig
from cnn.distributed import make_deterministic, process_group
from cnn.manifest import Manifest
from cnn.networks import build_network
from cnn.optim import build_optimizer
from cnn.packed import PackedSplit
from cnn.preprocess import preprocess
from cnn.shards import shard_path
from cnn.trainer import Trainer
from tests.bench.comparison import Comparison, compare

IMAGES, SIZE, CLASSES = 20_000, 28, 10
STEPS = 40  # a round


def compare_with_bare_loop(model: str, *, rounds: int) -> Comparison:
    """`Trainer.train_step` against forward, backward and optimizer step on one batch that never leaves memory.

    Both: one process, one thread, channels_last, the same network, optimizer and batch size. The trainer also draws
    each image from the packed shards, shifts, flips and normalises it, runs the batch as four lanes, and reports.
    """
    make_deterministic()
    config = TrainConfig(model=model)
    with tempfile.TemporaryDirectory() as folder, process_group() as (device, exchange):
        manifest = _pack(Path(folder))
        train, val = (
            PackedSplit([shard_path(Path(folder), shard.sha256) for shard in manifest.splits[split].shards])
            for split in ("train", "val")
        )
        trainer = Trainer(config, manifest=manifest, train=train, val=val, device=device, exchange=exchange)

        network = build_network(config, channels=1, image_size=SIZE, classes=CLASSES)
        network = network.to(memory_format=torch.channels_last)
        optimizer = build_optimizer(config, network)
        images, labels = train.slice(0, config.batch_size)
        images = trainer.normalise(images)

        def bare_step() -> None:
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(network(images), labels, label_smoothing=config.label_smoothing)
            loss.backward()
            optimizer.step()

        def our_step() -> None:
            trainer.train_step()
            list(trainer.reports())

        return compare(model, our_step, bare_step, amount=config.batch_size, calls=STEPS, rounds=rounds)


def _pack(folder: Path) -> Manifest:
    """Packed images of the right number and shape; what they show makes no difference to the time."""
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (IMAGES, SIZE, SIZE), dtype=torch.uint8, generator=random)
    labels = torch.randint(CLASSES, (IMAGES,), dtype=torch.uint8, generator=random)
    files = {}
    for name, magic, values in (("images-idx3", 0x803, images), ("labels-idx1", 0x801, labels)):
        path = folder / f"train-{name}-ubyte"
        header = b"".join(number.to_bytes(4, "big") for number in (magic, *values.shape))
        path.write_bytes(header + values.numpy().tobytes())
        files[path.name] = path
    return preprocess("idx", files, PreprocessConfig(), folder)
