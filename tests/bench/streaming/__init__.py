"""Reading from an object store, cold and warm, against libraries made for it."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from tests.bench.comparison import Comparison, LeftOut
from tests.bench.servers import object_store
from tests.bench.streaming.data import Data, prepare

IMAGES = (4_000,)
LEAST = 2_048  # images; Convoy leaves out what does not fill a batch of 1024
PHOTOGRAPHS = 20_000  # up to so many images are of 224×224, more are of 28×28
OTHERS = {"webdataset": "WebDataset", "mosaicml": "MosaicML Streaming"}
UNITS = {"cold": "img/s", "warm": "img/s", "memory": "MB"}

Figures = dict[str, float]


def streaming(rounds: int, images: Sequence[int] = IMAGES) -> Iterator[Comparison]:
    """Images/s from S3, cold and warm, and memory, against WebDataset and MosaicML Streaming.

    All read the same images from the same local SeaweedFS in batches of 256: up to 20 000 images are crops of
    photographs of 224×224, more are Fashion-MNIST; JPEG against JPEG, and raw pixels against raw pixels.
    """
    others = [name for name in OTHERS if _installed(name)]
    if not others:
        raise LeftOut("none of the other libraries is installed")
    with object_store() as settings:
        os.environ["S3_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL"]  # MosaicML's name for it
        os.environ["CONVOY_HOME"] = str(settings.home)
        for count in images:
            for encoding in ("jpeg", "raw"):
                kind = "photographs" if count <= PHOTOGRAPHS else "fashion"
                folder = settings.home.parent / f"{count}-{encoding}"
                data = Data(kind=kind, images=count, encoding=encoding, bucket=settings.bucket, folder=str(folder))
                size = prepare(data, [(_command("write", name, data), _environment(name)) for name in others])
                print(f"{data.name}: {size / 1e6:,.0f} MB", file=sys.stderr)
                yield from _compare(data, others, rounds)


def _compare(data: Data, others: Sequence[str], rounds: int) -> Iterator[Comparison]:
    figures: dict[str, list[Figures]] = {name: [] for name in ("convoy", *others)}
    for _ in range(rounds):
        for name, found in figures.items():
            found.append(_read(name, data))
            print(f"{data.name}, {name}: {found[-1]}", file=sys.stderr)
    for name in others:
        for what, unit in UNITS.items():
            yield Comparison(
                name=f"{data.name}, {what}",
                ours_label="Convoy",
                theirs_label=OTHERS[name],
                unit=unit,
                ours=tuple(each[what] for each in figures["convoy"]),
                theirs=tuple(each[what] for each in figures[name]),
            )


def _read(name: str, data: Data) -> Figures:
    """Figures of a process that has read the data from an empty cache; one that fails is started again."""
    for try_again in (True, True, False):
        with tempfile.TemporaryDirectory(dir=data.folder) as place:
            command = _command("read", name, data, f"{place}/cache")
            ended = subprocess.run(
                command, env=_environment(name), stdin=subprocess.DEVNULL, capture_output=True, text=True
            )
        if not ended.returncode:
            return json.loads(ended.stdout.splitlines()[-1])
        message = f"{data.name}, {name} failed: {ended.stderr.strip().splitlines()[-1]}"
        if not try_again:
            raise RuntimeError(message)
        print(message, file=sys.stderr)
    raise AssertionError("unreachable")


def _command(what: str, name: str, data: Data, *rest: str) -> list[str]:
    return [sys.executable, "-m", "tests.bench.streaming.process", what, name, data.to_json(), *rest]


def _environment(name: str) -> dict[str, str]:
    """MosaicML Streaming asks for older libraries than Convoy's, so it has a folder of its own; see the Makefile."""
    if name != "mosaicml":
        return dict(os.environ)
    paths = [str(Path(sys.prefix) / "mosaicml"), os.getcwd()]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


@cache
def _installed(name: str) -> bool:
    command = [sys.executable, "-c", f"import {'streaming' if name == 'mosaicml' else name}"]
    return not subprocess.run(command, env=_environment(name), capture_output=True).returncode
