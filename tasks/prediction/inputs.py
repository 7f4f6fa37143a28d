"""The inputs of a prediction: lists image files without reading them, and says what they are to be converted to.

Files are given by their names, or by names of folders and bucket prefixes.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple, cast, get_args

from cnn.config.preprocessing import Resize
from cnn.formats.decode import Target
from cnn.formats.layout import SUFFIXES
from infra.errors import UsageError
from infra.storage.object_store import ObjectStore, parse_s3
from infra.tracking.served_model import ServedModel


class Picture(NamedTuple):
    """An image file that is not read yet."""

    name: str
    size: int
    """Bytes."""

    read: Callable[[], bytes]


def pictures(inputs: Iterable[str]) -> Iterator[Picture]:
    """Yields the files of the inputs: each named file, whatever its suffix, and the images in folders and prefixes.

    Raises:
        UsageError: there is no such file, or a folder contains no image.
        ServiceError: the object store failed.
    """
    for given in inputs:
        found = False
        for picture in _in_bucket(given) if given.startswith("s3://") else _on_disk(given):
            found = True
            yield picture
        if not found:
            raise UsageError(f"{given}: no PNG, JPEG, WebP or BMP image there")


def target_of(served: ServedModel) -> Target:
    """Returns size, channels and geometry of a version's images.

    Raises:
        UsageError: the version cannot be used here, or a newer Convoy made it with another geometry.
        ServiceError: MLflow failed.
    """
    channels, side, _ = served.shape
    if served.resize not in get_args(Resize):
        raise UsageError(
            f"{served.version.uri} makes images square by {served.resize!r}, which this version of Convoy does not know"
        )
    return Target(side, channels, cast(Resize, served.resize))


def _on_disk(given: str) -> Iterator[Picture]:
    # functions of os.path, since methods of Path raise where one may not look
    if os.path.isfile(given):
        yield _file(Path(given))
    elif os.path.isdir(given):
        for folder, inner, names in os.walk(given, onerror=_refuse):
            inner[:] = sorted(name for name in inner if not name.startswith("."))
            for name in sorted(names):
                path = Path(folder, name)
                if _is_image(name) and os.path.isfile(path):
                    yield _file(path)
    elif "://" in given:
        raise UsageError(f"{given}: name files, a folder, or an s3:// address")
    else:
        raise UsageError(f"{given}: no such file or folder")


def _refuse(error: OSError) -> None:
    raise UsageError(f"{error.filename}: cannot be read: {error.strerror}") from error


def _file(path: Path) -> Picture:
    name = os.fsencode(path).decode(errors="backslashreplace")  # it may not be valid UTF-8
    return Picture(name, path.stat().st_size, path.read_bytes)


def _in_bucket(address: str) -> Iterator[Picture]:
    bucket, key = parse_s3(address)
    store = ObjectStore.connect(bucket, create=False)

    def picture(key: str, size: int) -> Picture:
        return Picture(store.uri(key), size, lambda: store.get_bytes(key))

    if key and not key.endswith("/") and (info := store.head(key)):
        yield picture(key, info.size)
        return
    prefix = key.rstrip("/") + "/" if key else ""
    for info in store.list(prefix):
        path = info.key.removeprefix(prefix)
        if _is_image(path) and not any(part.startswith(".") for part in path.split("/")):
            yield picture(info.key, info.size)


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES and not name.startswith(".")
