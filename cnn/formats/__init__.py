"""Where labelled images come from: one module a format, and one door, `open_source`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from cnn.formats.archive import ArchiveImages
from cnn.formats.block import LabelledImages
from cnn.formats.cifar import CifarImages
from cnn.formats.digits import DigitsImages
from cnn.formats.files import Files, LocalFiles
from cnn.formats.folder import FolderImages
from cnn.formats.idx import IdxImages
from cnn.formats.layout import LeftOut

Format = Literal["idx", "cifar", "digits", "folder", "archive"]


def open_source(
    format: Format,
    files: Mapping[str, Path] | Files,
    classes: Sequence[str] | None = None,
    left_out: LeftOut | None = None,
) -> LabelledImages:
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
        return FolderImages(LocalFiles(files) if isinstance(files, Mapping) else files, left_out)
    if not isinstance(files, Mapping):
        raise TypeError(f"files of format {format} must be local")
    match format:
        case "idx":
            return IdxImages(files, classes)
        case "cifar":
            return CifarImages(files)
        case "digits":
            return DigitsImages(files)
        case "archive":
            return ArchiveImages(files)
