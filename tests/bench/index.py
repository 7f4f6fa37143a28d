"""The image index: how much longer packing takes with it, and the memory that it takes for a million images.

As a program, `python -m tests.bench.index IMAGES` writes an index of so many images, and prints its peak memory in MB.
"""

import io
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from cnn.config.preprocessing import PreprocessConfig
from cnn.data.manifest import Manifest
from cnn.formats.decode import Target
from cnn.formats.folder import FolderImages
from cnn.preprocessing.pack import Packed, pack
from cnn.preprocessing.survey import Plan, survey
from tasks.data.image_index import write_index
from tests.bench.comparison import Comparison

IMAGES, FILES, SIZE, CLASSES = 20_000, 500, 32, 10
MANY, FEWER = 1_000_000, 100_000


class InMemory:
    """Small pictures in class folders; every path leads to one of `FILES` contents."""

    folders = ()

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self._files = []
        for _ in range(FILES):
            buffer = io.BytesIO()
            Image.fromarray(random.integers(256, size=(SIZE, SIZE, 3), dtype=np.uint8)).save(buffer, "PNG")
            self._files.append(buffer.getvalue())
        self.paths = [f"c{number * CLASSES // IMAGES}/{number:06}.png" for number in range(IMAGES)]

    def size(self, position: int) -> int:
        return len(self._files[position % FILES])

    def read(self, position: int) -> bytes:
        return self._files[position % FILES]


def index(rounds: int) -> Iterator[Comparison]:
    """Packing with an image index against packing alone; memory of an index of 1 000 000 against 100 000 images."""
    source, config = FolderImages(InMemory()), PreprocessConfig()
    packing, indexing = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            began = time.perf_counter()
            plan = survey(source, config)
            packed = pack(source, plan, config, Path(folder))
            done = time.perf_counter()
            write_index(Path(folder, "index.parquet"), source, plan, packed, None)
            packing.append(done - began)
            indexing.append(time.perf_counter() - done)
    yield Comparison(
        name=f"index: {IMAGES:,} images",
        ours_label="packing with index",
        theirs_label="packing",
        unit="s",
        ours=tuple(a + b for a, b in zip(packing, indexing, strict=True)),
        theirs=tuple(packing),
    )
    many, fewer = (tuple(_memory(images) for _ in range(rounds)) for images in (MANY, FEWER))
    yield Comparison(
        name="index: memory",
        ours_label=f"{MANY:,} images",
        theirs_label=f"{FEWER:,} images",
        unit="MB",
        ours=many,
        theirs=fewer,
    )


def _memory(images: int) -> float:
    program = [sys.executable, "-m", "tests.bench.index", str(images)]
    return float(subprocess.run(program, check=True, capture_output=True, text=True).stdout)


class Names:
    """A source of which only the names are read."""

    classes = tuple(f"c{number}" for number in range(CLASSES))
    groups = None

    def __init__(self, images: int) -> None:
        self._images = images

    def __len__(self) -> int:
        return self._images

    def names(self) -> Iterator[str]:
        return (f"c{number % CLASSES}/photo-{number:07}.jpg" for number in range(self._images))


def main(images: int) -> None:
    random = np.random.default_rng(0)
    splits = random.choice(3, images, p=[0.75, 0.1, 0.15]).astype(np.int8)
    plan = Plan(
        target=Target(SIZE, 3),
        labels=np.arange(images) % CLASSES,
        splits=splits,
        digests=random.integers(0, 256, (images, 32), dtype=np.uint8),
        headers=Counter(),
        duplicates=0,
        shared=0,
    )
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        nothing = Manifest.model_construct()
        write_index(Path(folder, "index.parquet"), Names(images), plan, Packed(nothing, splits), None)  # type: ignore[arg-type]
    status = Path("/proc/self/status").read_text()  # getrusage would count the process that started this one
    print(int(status.partition("VmHWM:")[2].split()[0]) / 1024)


if __name__ == "__main__":
    main(int(sys.argv[1]))
