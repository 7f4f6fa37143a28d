"""Made images: what they show makes no difference to a time, as long as it is not constant."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cnn.data.manifest import Manifest, SourceReport, SplitInfo, Spread
from cnn.data.mapped_split import MappedSplit
from cnn.data.shard_writer import ShardWriter, shard_path

CLASSES = 10
CHUNK = 50_000  # images made at a time


@contextmanager
def packed_images(images: int = 60_000, size: int = 28) -> Iterator[Path]:
    """A folder with a dataset version of grey noise; validation and test split are the training split."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        _write_packed(Path(name), images, size)
        yield Path(name)


def open_packed(folder: Path) -> tuple[Manifest, MappedSplit]:
    """What `packed_images` wrote: the manifest and the training split."""
    manifest = Manifest.from_bytes((folder / "manifest.json").read_bytes())
    return manifest, MappedSplit([shard_path(folder, shard.sha256) for shard in manifest.splits["train"].shards])


def _write_packed(folder: Path, images: int, size: int) -> None:
    random = np.random.default_rng(0)
    writer = ShardWriter(folder, (1, size, size))
    for start in range(0, images, CHUNK):
        count = min(CHUNK, images - start)
        pixels = random.integers(256, size=(count, 1, size, size), dtype=np.uint8)
        writer.add(pixels, random.integers(CLASSES, size=count))
    split = SplitInfo(count=images, class_counts=(images // CLASSES,) * CLASSES, shards=writer.close())
    side = Spread(min=size, median=size, max=size)
    report = SourceReport(
        images=images,
        packed=images,
        unreadable=0,
        unreadable_examples=(),
        duplicates=0,
        width=side,
        height=side,
        modes={"L": images},
        warnings=(),
    )
    manifest = Manifest(
        classes=tuple(map(str, range(CLASSES))),
        channels=1,
        image_size=size,
        splits={"train": split, "val": split, "test": split},
        mean=(0.5,),
        std=(0.29,),
        report=report,
    )
    (folder / "manifest.json").write_bytes(manifest.to_bytes())


def pictures(count: int, channels: int, size: int) -> Tensor:
    """Soft blotches with some noise, uint8 N×C×H×W: their compressed files are about as large as photographs'."""
    random = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, channels, size // 7, size // 7, generator=random)
    made = torch.empty(count, channels, size, size, dtype=torch.uint8)
    for image, blotches in zip(made, coarse, strict=True):
        smooth = F.interpolate(blotches[None], size=(size, size), mode="bicubic")[0] * 255
        image.copy_((smooth + 6 * torch.randn(smooth.shape, generator=random)).clamp(0, 255))
    return made
