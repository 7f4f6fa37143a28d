"""The digits of scikit-learn (1 797 real images of 8×8 pixels), packed once a session."""

import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from cnn.config.preprocessing import PreprocessConfig
from cnn.config.training import TrainConfig
from cnn.data.manifest import Manifest, Shard, SourceReport, SplitInfo, Spread
from cnn.data.mapped_split import MappedSplit
from cnn.data.shard_writer import ShardWriter, shard_path
from cnn.data.streamed_split import StreamedSplit
from cnn.distributed.lanes import Exchange
from cnn.distributed.process_group import make_deterministic, process_group
from cnn.preprocessing.pack import preprocess


@dataclass(frozen=True)
class Packed:
    folder: Path
    manifest: Manifest

    def split(self, name: str) -> MappedSplit:
        return MappedSplit([self.folder / f"{shard.sha256}.safetensors" for shard in self.manifest.splits[name].shards])


def source_report(images: int = 1, side: int = 1) -> SourceReport:
    """Returns the report of a source of square images in which nothing was found."""
    spread = Spread(min=side, median=side, max=side)
    return SourceReport(
        images=images,
        packed=images,
        unreadable=0,
        unreadable_examples=(),
        duplicates=0,
        width=spread,
        height=spread,
        modes={},
        warnings=(),
    )


def check_export_takes_any_number(served: nn.Module, images: Tensor) -> None:
    """Exports a network, and checks that it gives for some images what it gives for all of them."""
    exported = torch.export.export(served, (images[:2],), dynamic_shapes=[{0: torch.export.Dim.AUTO}]).module()
    with torch.inference_mode():
        whole = served(images)
        for count in (1, 3, len(images)):
            torch.testing.assert_close(exported(images[:count]), whole[:count])


class FewFiles:
    """Makes shards local files by copying them, and has at most so many of them at a time: the oldest one leaves."""

    def __init__(self, packed: Packed, place: Path, most: int) -> None:
        self._packed, self._place, self._most = packed, place, most
        self._lock = threading.Lock()
        self.fetched: list[str] = []
        place.mkdir(parents=True, exist_ok=True)

    def __call__(self, shard: Shard) -> Path:
        path = self._place / shard.sha256
        with self._lock:
            if not path.exists():
                here = sorted(self._place.iterdir(), key=lambda file: file.stat().st_mtime_ns)
                for file in here[: len(here) + 1 - self._most]:
                    file.unlink()
                shutil.copyfile(shard_path(self._packed.folder, shard.sha256), path)
                self.fetched.append(shard.sha256)
            os.utime(path)
        return path


def streamed(packed: Packed, name: str, place: Path, *, most: int = 6, ahead: int = 10_000) -> StreamedSplit:
    """A split whose shards come one by one, and of which few are here at a time."""
    size = packed.manifest.image_size
    return StreamedSplit(
        packed.manifest.splits[name].shards,
        (packed.manifest.channels, size, size),
        FewFiles(packed, place, most),
        encoding=packed.manifest.encoding,
        ahead=ahead,
    )


@pytest.fixture(scope="session")
def many_shards(digits: Packed, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """The digits in shards of 37 images."""
    folder = tmp_path_factory.mktemp("many-shards")

    def packed_again(name: str, info: SplitInfo) -> SplitInfo:
        writer = ShardWriter(folder, (1, 8, 8), shard_bytes=37 * 64)
        split = digits.split(name)
        writer.add(*(tensor.numpy() for tensor in split.slice(0, len(split))))
        return info.model_copy(update={"shards": writer.close()})

    splits = {name: packed_again(name, info) for name, info in digits.manifest.splits.items()}
    manifest = digits.manifest.model_copy(update={"splits": splits})
    (folder / "manifest.json").write_bytes(manifest.to_bytes())
    return Packed(folder, manifest)


def write_encoded(folder: Path, images: Tensor, labels: Tensor, kind: str) -> Shard:
    """A shard of images [n, C, H, W] as JPEG or WebP files."""
    files = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image.movedim(0, -1).squeeze(-1).numpy()).save(file, kind)
        files.append(file.getvalue())
    tensors = {
        "encoded": torch.frombuffer(bytearray(b"".join(files)), dtype=torch.uint8),
        "offsets": torch.tensor([0, *map(len, files)]).cumsum(0),
        "labels": labels,
    }
    save_file(tensors, folder / "new")
    sha256 = hashlib.sha256((folder / "new").read_bytes()).hexdigest()
    path = (folder / "new").rename(shard_path(folder, sha256))
    return Shard(sha256=sha256, count=len(labels), bytes=path.stat().st_size)


@pytest.fixture(scope="session")
def encoded(digits: Packed, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """The digits as JPEG files, in shards of 50 images."""
    folder = tmp_path_factory.mktemp("encoded")

    def packed_again(name: str, info: SplitInfo) -> SplitInfo:
        split = digits.split(name)
        parts = (split.slice(start, start + 50) for start in range(0, len(split), 50))
        return info.model_copy(update={"shards": tuple(write_encoded(folder, *part, "jpeg") for part in parts)})

    splits = {name: packed_again(name, info) for name, info in digits.manifest.splits.items()}
    manifest = digits.manifest.model_copy(update={"splits": splits, "encoding": "jpeg"})
    (folder / "manifest.json").write_bytes(manifest.to_bytes())
    return Packed(folder, manifest)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    folder = tmp_path_factory.mktemp("digits")
    csv = folder / "digits.csv"
    csv.write_bytes(gzip.decompress(files("sklearn.datasets.data").joinpath("digits.csv.gz").read_bytes()))
    manifest = preprocess("digits", {"digits.csv": csv}, PreprocessConfig(), folder)
    (folder / "manifest.json").write_bytes(manifest.to_bytes())
    return Packed(folder, manifest)


Plans = list[list[dict[str, Any]]]
"""The reports of all ranks, per plan."""


class Ranks:
    """The program that trains; see there for what plans are."""

    def __init__(self, program: "subprocess.Popen[str]") -> None:
        self._program = program

    def train(self, digits: Packed, config: TrainConfig, *plans: int | str, reader: str = "packed") -> Plans:
        assert self._program.stdin and self._program.stdout
        asked = [str(digits.folder), config.model_dump(mode="json"), reader, [str(plan) for plan in plans]]
        self._program.stdin.write(json.dumps(asked) + "\n")
        self._program.stdin.flush()
        found = json.loads(self._program.stdout.readline())
        assert found is not None, "a rank failed, and printed why"
        return found


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    program = subprocess.Popen(
        [sys.executable, "-m", "tests.cnn.rank_program"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with program:  # its input ends, and so does it
        yield Ranks(program)


@contextmanager
def joined_group() -> Iterator[tuple[torch.device, Exchange]]:
    """Has this process be the only rank of a training, and undoes what that sets."""
    threads = torch.get_num_threads()
    make_deterministic()
    with process_group() as joined:
        yield joined
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
