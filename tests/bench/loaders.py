"""Reading images in random order, in batches of uint8 with augmentation off: one process, no training.

Convoy decodes every image once, when it packs a dataset version; that is not timed here. The others decode in every
epoch, by torchvision's decoders, which are faster than Pillow, in as many workers as turned out fastest of `WORKERS`.
"""

import io
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_image

from cnn.data.mapped_split import MappedSplit
from cnn.data.shard_writer import ShardWriter, shard_path
from cnn.distributed.process_group import make_deterministic
from cnn.training.random_streams import epoch_order
from tests.bench.comparison import Comparison, Side, compare, fastest, rate, require
from tests.bench.data import CLASSES, pictures

BATCH = 256
WORKERS = (0, 1, 2)
TARS = 4
SHUFFLE = 1000  # images in WebDataset's shuffle buffer
OUR_PASSES = 20  # a round; theirs do one
OPTIONS = {"png": {}, "jpeg": {"quality": 90}}


def small_images(rounds: int) -> Iterator[Comparison]:
    """Images/s from Convoy's packed shards (decoded once) against ImageFolder and WebDataset: 4 000 PNG of 28×28."""
    yield from _compare("loader28", 4_000, channels=1, size=28, kind="png", rounds=rounds)


def large_images(rounds: int) -> Iterator[Comparison]:
    """Images/s from Convoy's packed shards (decoded once) against ImageFolder and WebDataset: 1 000 JPEG of 224×224."""
    yield from _compare("loader224", 1_000, channels=3, size=224, kind="jpeg", rounds=rounds)


def _compare(name: str, count: int, *, channels: int, size: int, kind: str, rounds: int) -> Iterator[Comparison]:
    make_deterministic()
    mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        packed = _write(Path(folder), pictures(count, channels, size), kind)
        ours = Side("Convoy", rate(_one_pass(_Packed(packed)), calls=OUR_PASSES))

        def fastest_of(label: str, loader: Callable[[int], DataLoader[Any]]) -> Side:
            sides = [Side(f"{label}, {workers} workers", rate(_one_pass(loader(workers)))) for workers in WORKERS]
            return fastest(sides)

        theirs = fastest_of("ImageFolder", partial(_image_folder, Path(folder), mode))
        yield compare(f"{name}: {kind}", ours, theirs, rounds=rounds)
        require("webdataset")
        theirs = fastest_of("WebDataset", partial(_web_dataset, Path(folder), mode, kind))
        yield compare(f"{name}: {kind}", ours, theirs, rounds=rounds)


def _one_pass(loader: Iterable[tuple[Tensor, Tensor]]) -> Callable[[], float]:
    """Work that reads all images once and says how many they were."""
    return lambda: sum(len(images) for images, _ in loader)


class _Packed:
    """Batches from Convoy's shards, in another order in each pass."""

    def __init__(self, split: MappedSplit) -> None:
        self._split, self._epoch = split, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self._epoch += 1
        for index in epoch_order(0, self._epoch, len(self._split)).split(BATCH):
            yield self._split.gather(index)


def _image_folder(place: Path, mode: ImageReadMode, workers: int) -> DataLoader[Any]:
    images = ImageFolder(str(place / "folder"), loader=partial(decode_image, mode=mode))
    return DataLoader(images, batch_size=BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0)


def _web_dataset(place: Path, mode: ImageReadMode, kind: str, workers: int) -> DataLoader[Any]:
    """Batches are made in the workers, as WebDataset's manual advises."""
    import webdataset

    def decode(data: bytes) -> Tensor:
        return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode)

    tars = sorted(map(str, place.glob("*.tar")))
    samples = (
        webdataset.WebDataset(tars, shardshuffle=len(tars))
        .shuffle(SHUFFLE)
        .to_tuple(kind, "cls")
        .map_tuple(decode, int)
        .batched(BATCH, collation_fn=default_collate)
    )
    return DataLoader(samples, batch_size=None, num_workers=workers, persistent_workers=workers > 0)


def _write(place: Path, images: Tensor, kind: str) -> MappedSplit:
    """The images as files in class folders, as tar shards, and packed."""
    labels = torch.arange(len(images)) % CLASSES
    for label in range(CLASSES):
        (place / "folder" / str(label)).mkdir(parents=True)
    with ExitStack() as stack:
        tars = [stack.enter_context(tarfile.open(place / f"{number}.tar", "w")) for number in range(TARS)]
        for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            file = io.BytesIO()
            Image.fromarray(image.movedim(0, -1).squeeze(-1).numpy()).save(file, kind, **OPTIONS[kind])
            (place / "folder" / str(label) / f"{number:05}.{kind}").write_bytes(file.getvalue())
            for name, data in ((kind, file.getvalue()), ("cls", str(label).encode())):
                entry = tarfile.TarInfo(f"{number:05}.{name}")
                entry.size = len(data)
                tars[number % TARS].addfile(entry, io.BytesIO(data))
    writer = ShardWriter(place, tuple(images.shape[1:]))
    writer.add(images.numpy(), labels.numpy())
    return MappedSplit([shard_path(place, shard.sha256) for shard in writer.close()])
