"""The data of a comparison, in the object store: once for each contestant, the same images in its own format."""

import itertools
import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from safetensors.numpy import load_file

from cnn.data.encoding import encode
from cnn.data.manifest import Manifest, SourceReport, SplitInfo, Spread
from cnn.data.shard_writer import ShardWriter, shard_path
from infra.settings import Settings
from infra.sources.base import Workplace
from infra.sources.find import find_source
from infra.sources.mirrors import Mirrors
from infra.storage import bucket_layout
from infra.storage.cache import Cache
from infra.storage.object_store import ObjectStore
from tests.bench.data import CLASSES
from tests.bench.streaming.images import Block, fashion, photographs

QUALITY = 90
TOGETHER = 64  # images that a thread encodes at a time


@dataclass(frozen=True, kw_only=True)
class Data:
    """Some images, and where they are."""

    kind: Literal["photographs", "fashion"]
    images: int
    encoding: Literal["raw", "jpeg"]
    bucket: str
    folder: str
    """Here: Convoy's manifest and shards, and what is made of them before it is uploaded."""

    @property
    def shape(self) -> tuple[int, int, int]:
        return (3, 224, 224) if self.kind == "photographs" else (1, 28, 28)

    @property
    def name(self) -> str:
        return f"{self.images:,} {self.encoding} {self.shape[-1]}×{self.shape[-1]}"

    def prefix(self, contestant: str) -> str:
        """Where a contestant's files are in the bucket."""
        return f"bench/{self.kind}-{self.images}-{self.encoding}/{contestant}/"

    @property
    def manifest(self) -> Manifest:
        return Manifest.from_bytes((Path(self.folder) / "manifest.json").read_bytes())

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def samples(data: Data) -> Iterator[tuple[bytes, int]]:
    """Each image, as its pixels' bytes or as a JPEG file, with its label: from Convoy's shards."""
    for shard in data.manifest.splits["train"].shards:
        tensors = load_file(shard_path(Path(data.folder), shard.sha256))
        labels = tensors["labels"].tolist()
        if data.encoding == "raw":
            yield from zip((image.tobytes() for image in tensors["images"]), labels, strict=True)
        else:
            files, offsets = tensors["encoded"].tobytes(), tensors["offsets"].tolist()
            yield from zip((files[start:stop] for start, stop in itertools.pairwise(offsets)), labels, strict=True)


def prepare(data: Data, contestants: list[tuple[list[str], dict[str, str]]]) -> int:
    """Make the images, store them as Convoy does, and have the others' formats written, side by side.

    Args:
        contestants: the command and environment of each process that writes another format.

    Returns:
        Bytes of Convoy's shards.
    """
    folder = Path(data.folder)
    folder.mkdir(parents=True)
    manifest = _pack(data, folder)
    (folder / "manifest.json").write_bytes(manifest.to_bytes())
    store, shards = ObjectStore.connect(data.bucket), manifest.splits["train"].shards
    writers = [
        subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        for command, environment in contestants
    ]
    for shard in shards:
        store.put_file(bucket_layout.shard(shard.sha256), shard_path(folder, shard.sha256), sha256=shard.sha256)
    if any([writer.wait() for writer in writers]):
        raise RuntimeError("a format could not be written; see above")
    for shard in shards:
        shard_path(folder, shard.sha256).unlink()
    return sum(shard.bytes for shard in shards)


def upload(data: Data, contestant: str, folder: Path) -> None:
    """All files of a folder, under the contestant's prefix."""
    store = ObjectStore.connect(data.bucket)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        store.put_file(data.prefix(contestant) + path.relative_to(folder).as_posix(), path)


def _blocks(data: Data) -> Iterator[Block]:
    if data.kind == "photographs":
        return photographs(data.images)
    settings = Settings()
    store = ObjectStore.connect(data.bucket)
    cache = Cache(settings.cache, store)
    with Mirrors(settings.cache / "partial") as mirrors:
        source = find_source("fashion-mnist", mirrors, own_mirror=settings.mirror)
        raw = source.fetch(Workplace(mirrors=mirrors, store=store, cache=cache), lambda _: None, refresh=False)
    return fashion(data.images, {file.path: cache.fetch(file.key, file.sha256) for file in raw.files})


def _pack(data: Data, folder: Path) -> Manifest:
    writer = ShardWriter(folder, data.shape, encoding=data.encoding)
    with ThreadPoolExecutor() as threads:
        for images, labels in _blocks(data):
            if data.encoding == "raw":
                writer.add(images, labels)
                continue
            parts = [images[start : start + TOGETHER] for start in range(0, len(images), TOGETHER)]
            files = threads.map(lambda part: encode(part, "jpeg", QUALITY), parts)
            writer.add([file for part in files for file in part], labels)
    split = SplitInfo(count=data.images, class_counts=(data.images // CLASSES,) * CLASSES, shards=writer.close())
    side = Spread(min=data.shape[-1], median=data.shape[-1], max=data.shape[-1])
    report = SourceReport(
        images=data.images,
        packed=data.images,
        unreadable=0,
        unreadable_examples=(),
        duplicates=0,
        width=side,
        height=side,
        modes={"L" if data.shape[0] == 1 else "RGB": data.images},
        warnings=(),
    )
    return Manifest(
        classes=tuple(map(str, range(CLASSES))),
        channels=data.shape[0],
        image_size=data.shape[-1],
        splits=dict.fromkeys(("train", "val", "test"), split),
        mean=(0.5,) * data.shape[0],
        std=(0.29,) * data.shape[0],
        encoding=data.encoding,
        report=report,
    )
