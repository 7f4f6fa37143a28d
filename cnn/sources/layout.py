"""How paths say what an image shows: `class/.../image` or `split/class/.../image`."""

from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from os.path import splitext

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
    """The images among some files, in the order of their paths; 17 bytes for each."""

    classes: tuple[str, ...]
    chosen: NDArray[np.int64]
    """Where each image stands among the paths."""

    labels: NDArray[np.int64]
    splits: NDArray[np.int8]
    remarks: tuple[str, ...]


def arrange(paths: Sequence[str], folders: Iterable[str] = ()) -> Layout:
    """Find out each image's class and split from its path.

    Hidden files and what is not named like an image are left out. A single folder around everything is looked
    through. Classes are the sorted names of the class folders, over all splits.

    Args:
        paths: relative posix paths of files, sorted; of images, only their folders are kept.
        folders: the same of folders, where known: a class folder may be empty.

    Raises:
        InputError: no images, images outside class folders, an empty class folder, one class only.
    """
    images = array("q")  # positions of images, and of their folders in the order in which these are met
    image_folders = array("q")
    numbers: dict[str, int] = {}
    others, example = Counter[str](), ""  # not named like images: how many in which folder
    for position, path in enumerate(paths):
        if _is_hidden(path):
            continue
        if splitext(path)[1].lower() not in SUFFIXES:
            others[path.rpartition("/")[0]] += 1
            example = example or path
            continue
        images.append(position)
        image_folders.append(numbers.setdefault(path.rpartition("/")[0], len(numbers)))
    if not images:
        raise InputError(f"no {_KINDS} image found among {others.total()} files; put images into one folder a class")
    chosen, folder_of = np.array(images, dtype=np.int64), np.array(image_folders, dtype=np.int64)
    parts = [folder.split("/") if folder else [] for folder in numbers]
    depth = _wrapping(parts)
    top = {folder[depth] for folder in parts if len(folder) > depth}
    in_splits = bool(top) and all(name.lower() in SPLIT_FOLDERS for name in top)
    if in_splits and TRAIN not in {SPLIT_FOLDERS[name.lower()] for name in top}:
        raise InputError(f"there are folders {', '.join(sorted(top))} but none called train")
    level = depth + in_splits  # which part of a path is the class
    too_high = np.array([len(folder) <= level for folder in parts])
    if too_high.any():
        stray = paths[int(chosen[too_high[folder_of].argmax()])]
        wanted = "train/CLASS/IMAGE" if in_splits else "CLASS/IMAGE"
        raise InputError(f"{stray} lies outside any class folder; paths must look like {wanted}")
    classes = sorted({folder[level] for folder in parts})
    _check_classes(classes, _class_folders(others, folders, parts[0][:depth], level))
    labels = {name: label for label, name in enumerate(classes)}
    label_of = np.array([labels[folder[level]] for folder in parts], dtype=np.int64)
    split_of = np.array(
        [SPLIT_FOLDERS[folder[depth].lower()] if in_splits else UNDECIDED for folder in parts], dtype=np.int8
    )
    return Layout(
        classes=tuple(classes),
        chosen=chosen,
        labels=label_of[folder_of],
        splits=split_of[folder_of],
        remarks=_remarks(others.total(), example),
    )


def _is_hidden(path: str) -> bool:
    return path.startswith(".") or "/." in path or ("__MACOSX" in path and "__MACOSX" in path.split("/"))


def _wrapping(folders: Sequence[Sequence[str]]) -> int:
    """How many outer folders hold everything and yet leave a class folder inside."""
    depth = 0
    while all(len(folder) > depth + 1 for folder in folders) and len({folder[depth] for folder in folders}) == 1:
        depth += 1
    return depth


def _class_folders(others: Iterable[str], folders: Iterable[str], root: list[str], level: int) -> set[str]:
    """Class folders that are known from something else than an image in them."""
    seen = [folder.rstrip("/").split("/") for folder in (*others, *folders) if not _is_hidden(folder)]
    return {folder[level] for folder in seen if folder[: len(root)] == root and len(folder) > level}


def _check_classes(classes: Sequence[str], folders: Collection[str]) -> None:
    if empty := sorted(set(folders) - set(classes)):
        raise InputError(f"class folder {empty[0]} holds no {_KINDS} image; add some or remove the folder")
    if len(classes) == 1:
        raise InputError(f"there is only one class, {classes[0]}; a classifier needs at least two class folders")


def _remarks(others: int, example: str) -> tuple[str, ...]:
    if not others:
        return ()
    return (f"{others} files not named like {_KINDS} images were left out, for example {example}",)
