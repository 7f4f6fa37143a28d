"""Each library's own way of writing images and of reading them in random order, as its manual advises.

All store the same bytes of an image (its pixels, or a JPEG file) in files of up to 64 MB, and give batches of 256 as
uint8 [n, C, H, W] with int64 [n]; JPEG files are decoded by torchvision. What takes DataLoader workers has two.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torchvision.io import ImageReadMode, decode_image

from cnn.config.training import TrainConfig
from cnn.data.split_reader import Batch
from cnn.training.order import Order
from infra.storage.cache import Cache
from infra.storage.object_store import ObjectStore
from tasks.data.dataset import stream_split
from tests.bench.streaming.data import Data, samples

BATCH = 256
WORKERS = 2
FILE_BYTES = 64 << 20
SHUFFLE = 1000  # images in WebDataset's shuffle buffer
URL_SECONDS = 24 * 3600


class Contestant(Protocol):
    def write(self, data: Data, folder: Path) -> None:
        """Put files into an empty folder; they are uploaded then."""

    def epochs(self, data: Data, cache: Path) -> Iterator[Iterable[Batch]]:
        """Epoch after epoch from the object store, by way of a cache folder that is empty at first."""


class Convoy:
    """Lanes of 256 images from windows of a quarter of the images, as a training of one rank takes them."""

    def write(self, data: Data, folder: Path) -> None:
        raise NotImplementedError("its shards are what the others are made of")

    def epochs(self, data: Data, cache: Path) -> Iterator[Iterable[Batch]]:
        manifest = data.manifest
        info = manifest.splits["train"]
        config = TrainConfig(batch_size=4 * BATCH, lanes=4, shuffle_window=data.images // 4)
        limit = 2 * sum(shard.bytes for shard in info.shards)
        split = stream_split(Cache(cache, ObjectStore.connect(data.bucket), limit=limit), manifest, "train")
        order, epoch = Order(config, info), 0
        while True:
            yield split.batches([order.epoch(epoch, range(config.lanes)).flatten(0, 1)])
            epoch += 1


class WebDataset:
    """Tar files over HTTP (presigned), its `cache_dir`, shuffled files and a shuffle buffer."""

    def write(self, data: Data, folder: Path) -> None:
        import webdataset

        most = -(-data.images // (2 * WORKERS))
        with webdataset.ShardWriter(f"{folder}/%06d.tar", maxsize=FILE_BYTES, maxcount=most, verbose=0) as writer:
            for number, (image, label) in enumerate(samples(data)):
                writer.write({"__key__": f"{number:08}", "image": image, "cls": str(label).encode()})

    def epochs(self, data: Data, cache: Path) -> Iterator[Iterable[Batch]]:
        import webdataset

        store = ObjectStore.connect(data.bucket)
        urls = [_presigned(store, info.key) for info in store.list(data.prefix("webdataset"))]
        cache.mkdir(parents=True)
        batches = (
            webdataset.WebDataset(urls, shardshuffle=len(urls), cache_dir=str(cache))
            .shuffle(SHUFFLE)
            .to_tuple("image", "cls")
            .map_tuple(_decoder(data), int)
            .batched(BATCH, collation_fn=default_collate)
        )
        yield from _again(DataLoader(batches, batch_size=None, num_workers=WORKERS, persistent_workers=True))


class MosaicML:
    """Its MDS files, `StreamingDataset` on an s3:// address with `shuffle`; other options as they are."""

    def write(self, data: Data, folder: Path) -> None:
        from streaming import MDSWriter

        columns = {"image": "bytes", "label": "int"}
        with MDSWriter(out=str(folder), columns=columns, size_limit=FILE_BYTES) as writer:
            for image, label in samples(data):
                writer.write({"image": image, "label": label})

    def epochs(self, data: Data, cache: Path) -> Iterator[Iterable[Batch]]:
        from streaming import StreamingDataset

        decode = _decoder(data)

        class Images(StreamingDataset):
            def __getitem__(self, at: int) -> tuple[Tensor, int]:
                sample = super().__getitem__(at)
                return decode(sample["image"]), sample["label"]

        remote = f"s3://{data.bucket}/{data.prefix('mosaicml')}"
        images = Images(remote=remote, local=str(cache), shuffle=True, batch_size=BATCH)
        yield from _again(DataLoader(images, batch_size=BATCH, num_workers=WORKERS, persistent_workers=True))


CONTESTANTS: dict[str, Contestant] = {
    "convoy": Convoy(),
    "webdataset": WebDataset(),
    "mosaicml": MosaicML(),
}


def _again(loader: DataLoader[Any]) -> Iterator[Iterable[Batch]]:
    while True:
        yield loader


def _decoder(data: Data) -> Callable[[bytes], Tensor]:
    """From an image's bytes to uint8 [C, H, W]."""
    mode = ImageReadMode.GRAY if data.shape[0] == 1 else ImageReadMode.RGB

    def decode(image: bytes) -> Tensor:
        pixels = torch.frombuffer(bytearray(image), dtype=torch.uint8)
        return pixels.view(data.shape) if data.encoding == "raw" else decode_image(pixels, mode)

    return decode


def _presigned(store: ObjectStore, key: str) -> str:
    """An address that curl, which WebDataset calls, may read."""
    import boto3

    parameters = {"Bucket": store.bucket, "Key": key}
    return boto3.client("s3").generate_presigned_url("get_object", Params=parameters, ExpiresIn=URL_SECONDS)
