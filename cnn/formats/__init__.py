"""Where labelled images come from: one module a format, and one door, `open_source`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from cnn.formats.archive import ArchiveSource
from cnn.formats.block import Source
from cnn.formats.cifar import CifarSource
from cnn.formats.digits import DigitsSource
from cnn.formats.files import Files, LocalFiles
from cnn.formats.folder import FolderSource
from cnn.formats.idx import IdxSource
from cnn.formats.layout import LeftOut

Format = Literal["idx", "cifar", "digits", "folder", "archive"]


def open_source(
    format: Format,
    files: Mapping[str, Path] | Files,
    classes: Sequence[str] | None = None,
    left_out: LeftOut | None = None,
) -> Source:
    """Opens and checks a source.

    Args:
        files: path inside the source (relative, posix: `train/cat/1.png`) → local file of any name; or, of a
            `folder`, files that lie elsewhere.
        classes: names of the labels 0, 1, ... of an `idx` source, which has none of its own.
        left_out: of a `folder`: what it holds beside the files, if only its images are given.

    Raises:
        InputError: the source is damaged or is no labelled collection of images.
    """
    if format == "folder":
        return FolderSource(LocalFiles(files) if isinstance(files, Mapping) else files, left_out)
    if not isinstance(files, Mapping):
        raise TypeError(f"files of format {format} must be local")
    match format:
        case "idx":
            return IdxSource(files, classes)
        case "cifar":
            return CifarSource(files)
        case "digits":
            return DigitsSource(files)
        case "archive":
            return ArchiveSource(files)
