"""How paths say what an image shows: `class/.../image` or `split/class/.../image`."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from cnn.errors import InputError
from cnn.split import TEST, TRAIN, UNDECIDED, VAL

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp"})

SPLIT_FOLDERS = {
    "train": TRAIN,
    "training": TRAIN,
    "val": VAL,
    "valid": VAL,
    "validation": VAL,
    "test": TEST,
    "testing": TEST,
}
"""Names, in any case, of top folders that hold a split each."""

_KINDS = "PNG, JPEG, WebP or BMP"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The images among some files, in the order of their paths."""

    classes: tuple[str, ...]
    names: tuple[str, ...]
    labels: NDArray[np.int64]
    splits: NDArray[np.int8]
    remarks: tuple[str, ...]


def arrange(paths: Iterable[str], folders: Iterable[str] = ()) -> Layout:
    """Find out each image's class and split from its path.

    Hidden files and what is not named like an image are left out. A single folder around everything is looked
    through. Classes are the sorted names of the class folders, over all splits.

    Args:
        paths: relative posix paths of files.
        folders: the same of folders, where known: a class folder may be empty.

    Raises:
        InputError: no images, images outside class folders, an empty class folder, one class only.
    """
    files = [PurePosixPath(path) for path in sorted(paths) if not _is_hidden(path)]
    images = [file for file in files if file.suffix.lower() in SUFFIXES]
    others = [file for file in files if file.suffix.lower() not in SUFFIXES]
    if not images:
        raise InputError(f"no {_KINDS} image found among {len(files)} files; put images into one folder a class")
    depth = _wrapping(images)
    top = {image.parts[depth] for image in images if len(image.parts) > depth + 1}
    in_splits = bool(top) and all(name.lower() in SPLIT_FOLDERS for name in top)
    if in_splits and TRAIN not in {SPLIT_FOLDERS[name.lower()] for name in top}:
        raise InputError(f"there are folders {', '.join(sorted(top))} but none called train")
    level = depth + in_splits  # which part of a path is the class
    stray = next((image for image in images if len(image.parts) < level + 2), None)
    if stray:
        wanted = "train/CLASS/IMAGE" if in_splits else "CLASS/IMAGE"
        raise InputError(f"{stray} lies outside any class folder; paths must look like {wanted}")
    names = [image.parts[level] for image in images]
    classes = sorted(set(names))
    _check_classes(classes, _class_folders(others, folders, images[0].parts[:depth], level))
    labels = {name: label for label, name in enumerate(classes)}
    splits = [SPLIT_FOLDERS[image.parts[depth].lower()] if in_splits else UNDECIDED for image in images]
    return Layout(
        classes=tuple(classes),
        names=tuple(map(str, images)),
        labels=np.array([labels[name] for name in names], dtype=np.int64),
        splits=np.array(splits, dtype=np.int8),
        remarks=_remarks(others),
    )


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(path).parts)


def _wrapping(images: Sequence[PurePosixPath]) -> int:
    """How many outer folders hold everything and yet leave a class folder inside."""
    depth = 0
    while all(len(image.parts) > depth + 2 for image in images) and len({i.parts[depth] for i in images}) == 1:
        depth += 1
    return depth


def _class_folders(
    others: Iterable[PurePosixPath], folders: Iterable[str], root: tuple[str, ...], level: int
) -> set[str]:
    """Class folders that are known from something else than an image in them."""
    seen = [other.parent for other in others]
    seen += [PurePosixPath(folder) for folder in folders if not _is_hidden(folder)]
    return {folder.parts[level] for folder in seen if folder.parts[: len(root)] == root and len(folder.parts) > level}


def _check_classes(classes: Sequence[str], folders: Collection[str]) -> None:
    if empty := sorted(set(folders) - set(classes)):
        raise InputError(f"class folder {empty[0]} holds no {_KINDS} image; add some or remove the folder")
    if len(classes) == 1:
        raise InputError(f"there is only one class, {classes[0]}; a classifier needs at least two class folders")


def _remarks(others: Sequence[PurePosixPath]) -> tuple[str, ...]:
    if not others:
        return ()
    return (f"{len(others)} files not named like {_KINDS} images were left out, for example {others[0]}",)
