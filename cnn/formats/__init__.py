"""Reads labelled images: one module per format, and `open_source`, which opens any of them."""

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
from cnn.formats.layout import Given, LeftOut

Format = Literal["idx", "cifar", "digits", "folder", "archive"]


def open_source(
    format: Format,
    files: Mapping[str, Path] | Files,
    classes: Sequence[str] | None = None,
    left_out: LeftOut | None = None,
    given: Given | None = None,
) -> LabelledImages:
    """Opens and checks a source.

    Args:
        files: path inside the source (relative, posix: `train/cat/1.png`) → local file of any name; for a `folder` also
            files that are stored elsewhere.
        classes: names of the labels 0, 1, ... of an `idx` source, which contains no names.
        left_out: other files of a `folder`, if `files` contains its images only.
        given: what a label table says of the files of a `folder`.

    Raises:
        InputError: the source is damaged, or is no collection of labelled images.
    """
    if format == "folder":
        return FolderImages(LocalFiles(files) if isinstance(files, Mapping) else files, left_out, given)
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
