"""How paths say what an image shows: `class/.../image` or `split/class/.../image`."""

import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os.path import splitext
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cnn.data.splits import TEST, TRAIN, UNDECIDED, VAL
from cnn.errors import InputError, escaped

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

_UNLABELLED = -2  # the role of a top folder whose images have no labels, beside the splits

_ROLES = (
    (re.compile(r"(?:^|[^a-z])pred|unlabel"), _UNLABELLED),
    (re.compile(r"train"), TRAIN),
    (re.compile(r"test"), TEST),
    (re.compile(r"val|^dev$"), VAL),
)
"""What a top folder may be by its name, if the other top folders and what lies in them agree."""

_SPLIT_WORD = re.compile(
    r"(?:^|[^a-z])(?:train|test|val|valid|validat|dev|eval|evaluat|predict)(?:ing|ion|ions|s)?(?:set|data|images)?(?:[^a-z]|$)"
)
"""Names that look like splits whatever the others are called: `training_set` and `test1`, but not `trainers`."""

_KINDS = "PNG, JPEG, WebP or BMP"
_NAMED = 5  # classes named in a remark

Folder = tuple[str, ...]
"""The parts of a folder's path."""


class LeftOut(NamedTuple):
    """Files of a source that are left out, in words and per class."""

    remarks: tuple[str, ...] = ()
    """One for each reason for which something was left out."""

    classes: Mapping[str, int] = {}
    """Files left out of each class that lost any."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The images among some files, in the order of their paths; 17 bytes for each."""

    classes: tuple[str, ...]
    chosen: NDArray[np.int64]
    """Where each image stands among the paths."""

    labels: NDArray[np.int64]
    splits: NDArray[np.int8]
    left_out: LeftOut


@dataclass
class _Others:
    """Files of one kind that are left out: how many in which folder, and the first one."""

    kind: str
    folders: Counter[str] = field(default_factory=Counter)
    example: str = ""

    def add(self, path: str) -> None:
        self.folders[path.rpartition("/")[0]] += 1
        self.example = self.example or path


def arrange(paths: Sequence[str], folders: Iterable[str] = (), unreachable: Iterable[str] = ()) -> Layout:
    """Finds out each image's class and split from its path.

    Hidden files and what is not named like an image are left out. A single folder around everything is looked
    through. Classes are the sorted names of the class folders, over all splits, in Unicode's form NFC. Top folders
    are splits where they have the usual names, or where their names look like it and they hold the same classes.

    Args:
        paths: relative posix paths of files, sorted; of images, only their folders are kept.
        folders: the same of folders, where known: a class folder may be empty.
        unreachable: paths of entries that were listed but cannot be read as files, such as broken links.

    Raises:
        InputError: no images, images outside class folders, an empty class folder, one class only, or folders that
            may be splits or classes.
    """
    images = array("q")  # positions of images, and of their folders in the order in which these are met
    image_folders = array("q")
    numbers: dict[str, int] = {}
    others = _Others(f"files not named like {_KINDS} images")
    broken = _Others("entries that are no readable files (broken links, say)")
    unlabelled = _Others("images in folders without labels")
    for position, path in enumerate(paths):
        if _is_hidden(path):
            continue
        if splitext(path)[1].lower() not in SUFFIXES:
            others.add(path)
            continue
        images.append(position)
        image_folders.append(numbers.setdefault(path.rpartition("/")[0], len(numbers)))
    for path in sorted(unreachable):
        if not _is_hidden(path):
            broken.add(path)
    if not images:
        raise InputError(_nothing_found(others, broken))
    chosen, folder_of = np.array(images, dtype=np.int64), np.array(image_folders, dtype=np.int64)
    parts = [_parts(folder) for folder in numbers]
    roots, ignored = _roots(parts)
    if ignored:
        aside = np.array([any(folder[: len(root)] == root for root in ignored) for folder in parts])[folder_of]
        for position in chosen[aside].tolist():
            unlabelled.add(paths[position])
        chosen, folder_of = chosen[~aside], folder_of[~aside]
    places = [_place(folder, roots) for folder in parts]
    stray = np.array([place is None for place in places])[folder_of]
    if stray.any():
        wanted = "CLASS/IMAGE" if UNDECIDED in roots.values() else "train/CLASS/IMAGE"
        raise InputError(
            f"{paths[int(chosen[stray.argmax()])]} lies outside any class folder; paths must look like {wanted}"
        )
    losses = [_losses(each, roots) for each in (others, broken, unlabelled)]
    lost = sum(losses, Counter[str]())
    classes = sorted({place.name for place in places if place})
    _check_classes(classes, {place.name for folder in folders if (place := _at(folder, roots))}, lost)
    labels = {name: label for label, name in enumerate(classes)}
    label_of = np.array([labels[place.name] if place else -1 for place in places], dtype=np.int64)
    split_of = np.array([place.split if place else UNDECIDED for place in places], dtype=np.int8)
    return Layout(
        classes=tuple(classes),
        chosen=chosen,
        labels=label_of[folder_of],
        splits=split_of[folder_of],
        left_out=LeftOut(
            tuple(filter(None, map(_remark, (others, broken, unlabelled), losses))),
            {name: lost[name] for name in sorted(lost)},
        ),
    )


def _is_hidden(path: str) -> bool:
    """Returns whether a path is hidden, or a file that another system leaves behind."""
    if path.startswith(".") or "/." in path:
        return True
    return ("__MACOSX" in path or "Thumbs.db" in path) and not {"__MACOSX", "Thumbs.db"}.isdisjoint(path.split("/"))


# --- which folders are the classes -----------------------------------------------------------------


class _Place(NamedTuple):
    """The class and split that a folder belongs to."""

    name: str
    split: int


Roots = dict[Folder, int]
"""The folders around the class folders, and the split that each of them is."""


def _parts(folder: str) -> Folder:
    return tuple(folder.rstrip("/").split("/")) if folder else ()


def _place(folder: Folder, roots: Roots) -> _Place | None:
    """Returns the class folder that a folder is or lies in; None outside of class folders."""
    for root, split in roots.items():
        if folder[: len(root)] == root and len(folder) > len(root):
            return _Place(unicodedata.normalize("NFC", folder[len(root)]), split)
    return None


def _at(folder: str, roots: Roots) -> _Place | None:
    return None if _is_hidden(folder) else _place(_parts(folder), roots)


def _roots(folders: Sequence[Folder]) -> tuple[Roots, list[Folder]]:
    """Returns the folders around class folders, and folders whose images have no labels.

    Args:
        folders: of all images.

    Raises:
        InputError: there are splits but none to train on, or folders that may be splits or classes.
    """
    depth = _wrapping(folders)
    inside: dict[str, list[Folder]] = {}
    for folder in folders:
        if len(folder) > depth:
            inside.setdefault(folder[depth], []).append(folder)
    root = folders[0][:depth]
    roles = {name: _role(name) for name in inside}
    if inside and all(name.lower() in SPLIT_FOLDERS for name in inside) and TRAIN not in roles.values():
        raise InputError(f"there are folders {', '.join(sorted(inside))} but none called train")
    labelled = [name for name in inside if roles[name] != _UNLABELLED]
    if None not in roles.values() and (splits := _splits({name: inside[name] for name in labelled}, depth)):
        if len(labelled) == len(inside):
            return splits, []
        # A split that is left alone is a folder around everything.
        rest, _ = _roots([folder for name in labelled for folder in inside[name]])
        return rest, [(*root, name) for name in inside if name not in labelled]
    _refuse_likely_splits(inside, depth)
    return {root: UNDECIDED}, []


def _wrapping(folders: Sequence[Folder]) -> int:
    """How many outer folders hold everything and yet leave a class folder inside."""
    depth = 0
    while all(len(folder) > depth + 1 for folder in folders) and len({folder[depth] for folder in folders}) == 1:
        depth += 1
    return depth


def _role(name: str) -> int | None:
    """The split that a top folder may be by its name; None if its name says none, or several."""
    name = name.lower()
    if name in SPLIT_FOLDERS:
        return SPLIT_FOLDERS[name]
    found = {role for pattern, role in _ROLES if pattern.search(name)}
    return _UNLABELLED if _UNLABELLED in found else found.pop() if len(found) == 1 else None


def _splits(inside: Mapping[str, list[Folder]], depth: int) -> Roots | None:
    """The folders around the class folders of each split, if the top folders certainly are splits.

    They are if one holds training images and all hold the same classes, directly or in one more folder; or if all
    have the usual names.
    """
    roles = {name: role for name in inside if (role := _role(name)) is not None}
    if TRAIN not in roles.values():
        return None
    usual = all(name.lower() in SPLIT_FOLDERS for name in inside)
    for most in (1, 2) if usual or len(set(roles.values())) == len(roles) else ():
        roots: Roots = {}
        for name, held in inside.items():
            roots[held[0][: min(max(_wrapping(held), depth + 1), depth + most)]] = roles[name]
        sets = [{place.name if (place := _place(f, roots)) else "" for f in held} for held in inside.values()]
        if all(each == sets[0] for each in sets) and len(sets[0]) > 1 and "" not in sets[0]:
            return roots
    if usual and len(inside) > 1:
        return {held[0][: depth + 1]: SPLIT_FOLDERS[name.lower()] for name, held in inside.items()}
    return None


def _refuse_likely_splits(inside: Mapping[str, list[Folder]], depth: int) -> None:
    """Raises InputError if top folders that would become classes may be splits as well."""
    if len(inside) < 2:
        return
    remedy = "call them train, val, test, with the same class folders in each; if they are classes, rename them"
    below = {name: {folder[depth + 1] for folder in held if len(folder) > depth + 1} for name, held in inside.items()}
    for one in sorted(name for name in inside if below[name] and _role(name) is not None):
        if other := next((name for name in sorted(inside) if name != one and below[name] == below[one]), None):
            names = ", ".join(sorted(below[one])[:_NAMED])
            raise InputError(
                f"{one} and {other} hold folders of the same names ({names}): if they are splits, {remedy}"
            )
    likely = sorted(name for name in inside if _SPLIT_WORD.search(name.lower()))
    nested = [name for name in likely if all(len(folder) > depth + 1 for folder in inside[name])]
    if nested or len({_role(name) for name in likely}) > 1:
        beside = ", ".join(sorted(set(inside) - set(likely))[:_NAMED])
        raise InputError(
            f"by name {' and '.join(likely)} may be splits{f', but not {beside} beside them' if beside else ''}: "
            f"if they are, {remedy}"
        )


# --- what is said of it ----------------------------------------------------------------------------


def _check_classes(classes: Sequence[str], folders: Collection[str], lost: Mapping[str, int]) -> None:
    if empty := sorted({*folders, *lost} - {*classes}):
        instead = f" among its {lost[empty[0]]} files" if empty[0] in lost else ""
        raise InputError(f"class folder {empty[0]} holds no {_KINDS} image{instead}; add some or remove the folder")
    if len(classes) == 1:
        raise InputError(f"there is only one class, {classes[0]}; a classifier needs at least two class folders")


def _nothing_found(others: _Others, broken: _Others) -> str:
    found = f"no {_KINDS} image found among {others.folders.total()} files"
    if broken.folders:
        count = broken.folders.total()
        return f"{found} and {count} broken links, for example {broken.example}; fetch what they point to first"
    example = f", for example {others.example}" if others.example else ""
    return escaped(f"{found}{example}; put images into one folder per class")


def _losses(others: _Others, roots: Roots) -> Counter[str]:
    lost = Counter[str]()
    for folder, count in others.folders.items():
        if place := _at(folder, roots):
            lost[place.name] += count
    return lost


def _remark(others: _Others, lost: Counter[str]) -> str:
    if not others.folders:
        return ""
    most = sorted(lost.items(), key=lambda item: (-item[1], item[0]))
    named = ", ".join(f"{name} {count}" for name, count in most[:_NAMED])
    more = f" and {len(most) - _NAMED} more classes" if len(most) > _NAMED else ""
    per_class = f" ({named}{more})" if named else ""
    return escaped(f"{others.folders.total()} {others.kind} were left out{per_class}, for example {others.example}")
