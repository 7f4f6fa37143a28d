"""Derives each image's class and split from its path: `class/.../image` or `split/class/.../image`."""

import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os.path import commonprefix, splitext
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
"""Names of top folders that are splits; case does not matter."""

_UNLABELLED = -2  # the role of a top folder whose images have no labels; other roles are splits

_ROLES = (
    (re.compile(r"(?:^|[^a-z])pred|unlabel"), _UNLABELLED),
    (re.compile(r"train"), TRAIN),
    (re.compile(r"test"), TEST),
    (re.compile(r"val|^dev$"), VAL),
)
"""Patterns of names, and the role of a matching top folder if the other top folders and their contents agree."""

_SPLIT_WORD = re.compile(
    r"(?:^|[^a-z])(?:train|test|val|valid|validat|dev|eval|evaluat|predict)(?:ing|ion|ions|s)?(?:set|data|images)?(?:[^a-z]|$)"
)
"""Names that look like splits on their own: `training_set` and `test1`, but not `trainers`."""

_KINDS = "PNG, JPEG, WebP or BMP"
_MAX_NAMED = 5  # classes or folders that a message names

Folder = tuple[str, ...]
"""The parts of a folder's path."""


class LeftOut(NamedTuple):
    """The files of a source that are left out."""

    remarks: tuple[str, ...] = ()
    """One per reason for leaving files out."""

    classes: Mapping[str, int] = {}
    """Number of files per class, without classes that lost none."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The images among a list of files, in the order of their paths; 17 bytes per image."""

    classes: tuple[str, ...]
    chosen: NDArray[np.int64]
    """Position of each image in the list of paths."""

    labels: NDArray[np.int64]
    splits: NDArray[np.int8]
    left_out: LeftOut
    root: str = ""
    """Path of the folders around the class folders and splits, with a slash at its end; empty if there are none."""


class Given(NamedTuple):
    """What a label table says of files, in the order of their paths; None: it does not say."""

    labels: Sequence[str] | None = None
    """Class names; without them, the class folders give the labels."""

    splits: Sequence[str | None] | None = None
    """Names in `SPLIT_FOLDERS`; None for an image whose split is to be decided."""

    groups: Sequence[str | None] | None = None
    """Images of one group stay in one split; None for an image without a group."""


@dataclass
class _LeftOutFiles:
    """Files of one kind that are left out: their number per folder, and the first one."""

    kind: str
    folders: Counter[str] = field(default_factory=Counter)
    example: str = ""

    def add(self, path: str) -> None:
        self.folders[path.rpartition("/")[0]] += 1
        self.example = self.example or path


def arrange(paths: Sequence[str], folders: Iterable[str] = (), unreachable: Iterable[str] = ()) -> Layout:
    """Derives each image's class and split from its path.

    Hidden files, and files whose names are not those of images, are left out. A single folder around everything is
    ignored. Classes are the sorted names of the class folders of all splits, in Unicode's form NFC. Top folders are
    splits if they have the usual names, or if their names look like splits and they contain the same classes.

    Args:
        paths: relative posix paths of files, sorted.
        folders: relative posix paths of folders, if known: a class folder may be empty.
        unreachable: paths of entries that were listed but cannot be read as files, such as broken links.

    Raises:
        InputError: no images, images outside class folders, an empty class folder, only one class, or folders that
            may be splits or classes.
    """
    images = array("q")  # positions of images
    image_folders = array("q")  # numbers of their folders
    numbers: dict[str, int] = {}
    others = _LeftOutFiles(f"files not named like {_KINDS} images")
    broken = _LeftOutFiles("entries that are no readable files (broken links, say)")
    unlabelled = _LeftOutFiles("images in folders without labels")
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
            f"{paths[int(chosen[stray.argmax()])]} is outside of all class folders; paths must look like {wanted}"
        )
    left_out, root = (others, broken, unlabelled), _wrapper(roots)
    losses = [_losses(each, roots) for each in left_out]
    lost = sum(losses, Counter[str]())
    classes = sorted({place.name for place in places if place})
    _check_classes(classes, {place.name for folder in folders if (place := _place_of_path(folder, roots))}, lost)
    labels = {name: label for label, name in enumerate(classes)}
    label_of = np.array([labels[place.name] if place else -1 for place in places], dtype=np.int64)
    split_of = np.array([place.split if place else UNDECIDED for place in places], dtype=np.int8)
    return Layout(
        classes=tuple(classes),
        chosen=chosen,
        labels=label_of[folder_of],
        splits=split_of[folder_of],
        left_out=LeftOut(
            tuple(filter(None, (_remark(*each, root) for each in zip(left_out, losses, strict=True)))),
            {name: lost[name] for name in sorted(lost)},
        ),
        root=root,
    )


def arrange_given(given: Given, layout: Layout | None = None) -> Layout:
    """Returns the layout of the images of a label table; of all its files if it gives the labels.

    Args:
        layout: of the class folders, if the table gives no labels; their own splits take precedence.

    Raises:
        InputError: only one class.
    """
    if layout is None:
        assert given.labels is not None
        labels = [unicodedata.normalize("NFC", label) for label in given.labels]
        classes = sorted(set(labels))
        if len(classes) == 1:
            raise InputError(f"all {len(labels)} rows have the label {classes[0]!r}; a classifier needs two classes")
        label_of = {name: label for label, name in enumerate(classes)}
        layout = Layout(
            classes=tuple(classes),
            chosen=np.arange(len(labels)),
            labels=np.array([label_of[label] for label in labels], dtype=np.int64),
            splits=np.full(len(labels), UNDECIDED, dtype=np.int8),
            left_out=LeftOut(),
        )
    if given.splits is None or (layout.splits != UNDECIDED).any():
        return layout
    splits = np.array([UNDECIDED if split is None else SPLIT_FOLDERS[split] for split in given.splits], dtype=np.int8)
    return replace(layout, splits=splits[layout.chosen])


def _is_hidden(path: str) -> bool:
    """Checks whether a path is hidden, or is a file that other systems create for themselves."""
    if path.startswith(".") or "/." in path:
        return True
    return ("__MACOSX" in path or "Thumbs.db" in path) and not {"__MACOSX", "Thumbs.db"}.isdisjoint(path.split("/"))


# --- finding the class folders ---------------------------------------------------------------------


class _Place(NamedTuple):
    """The class and split that a folder belongs to."""

    name: str
    split: int


Roots = dict[Folder, int]
"""The folders that contain class folders, and the split of each."""


def _parts(folder: str) -> Folder:
    return tuple(folder.rstrip("/").split("/")) if folder else ()


def _place(folder: Folder, roots: Roots) -> _Place | None:
    """Returns the class and split of a folder that is a class folder or inside of one; None for other folders."""
    for root, split in roots.items():
        if folder[: len(root)] == root and len(folder) > len(root):
            return _Place(unicodedata.normalize("NFC", folder[len(root)]), split)
    return None


def _place_of_path(folder: str, roots: Roots) -> _Place | None:
    return None if _is_hidden(folder) else _place(_parts(folder), roots)


def _roots(folders: Sequence[Folder]) -> tuple[Roots, list[Folder]]:
    """Returns the folders that contain class folders, and the folders whose images have no labels.

    Args:
        folders: the folders of all images.

    Raises:
        InputError: there are splits but no training split, or folders that may be splits or classes.
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
        # If a single split remains, it is a folder around everything.
        rest, _ = _roots([folder for name in labelled for folder in inside[name]])
        return rest, [(*root, name) for name in inside if name not in labelled]
    _refuse_likely_splits(inside, depth)
    return {root: UNDECIDED}, []


def _wrapper(roots: Roots) -> str:
    """Returns the path of the folders around all class folders and splits, see `Layout.root`."""
    around = [root if split == UNDECIDED else root[:-1] for root, split in roots.items()]
    return "".join(f"{part}/" for part in commonprefix(around))  # noqa: RUF071  these are tuples of parts


def _wrapping(folders: Sequence[Folder]) -> int:
    """Returns the number of outer folders that contain all images, and have class folders inside."""
    depth = 0
    while all(len(folder) > depth + 1 for folder in folders) and len({folder[depth] for folder in folders}) == 1:
        depth += 1
    return depth


def _role(name: str) -> int | None:
    """Returns the role that a top folder's name suggests; None if it suggests none or several."""
    name = name.lower()
    if name in SPLIT_FOLDERS:
        return SPLIT_FOLDERS[name]
    roles = {role for pattern, role in _ROLES if pattern.search(name)}
    return _UNLABELLED if _UNLABELLED in roles else roles.pop() if len(roles) == 1 else None


def _splits(inside: Mapping[str, list[Folder]], depth: int) -> Roots | None:
    """Returns the folder that contains each split's class folders; None if top folders are not certainly splits.

    They are splits if one contains training images and all contain the same classes, directly or in one more folder;
    or if all have the usual names.
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
    """Raises InputError if top folders that would become classes may also be splits."""
    if len(inside) < 2:
        return
    remedy = "call them train, val, test, with the same class folders in each; if they are classes, rename them"
    below = {name: {folder[depth + 1] for folder in held if len(folder) > depth + 1} for name, held in inside.items()}
    for one in sorted(name for name in inside if below[name] and _role(name) is not None):
        if other := next((name for name in sorted(inside) if name != one and below[name] == below[one]), None):
            names = ", ".join(sorted(below[one])[:_MAX_NAMED])
            raise InputError(
                f"{one} and {other} contain folders with the same names ({names}): if they are splits, {remedy}"
            )
    likely = sorted(name for name in inside if _SPLIT_WORD.search(name.lower()))
    nested = [name for name in likely if all(len(folder) > depth + 1 for folder in inside[name])]
    if nested or len({_role(name) for name in likely}) > 1:
        rest = ", ".join(sorted(set(inside) - set(likely))[:_MAX_NAMED])
        raise InputError(
            f"by their names {' and '.join(likely)} may be splits{f', but not {rest}' if rest else ''}: "
            f"if they are, {remedy}"
        )


# --- messages --------------------------------------------------------------------------------------


def _check_classes(classes: Sequence[str], folders: Collection[str], lost: Mapping[str, int]) -> None:
    if empty := sorted({*folders, *lost} - {*classes}):
        instead = f" among its {lost[empty[0]]} files" if empty[0] in lost else ""
        raise InputError(f"class folder {empty[0]} holds no {_KINDS} image{instead}; add images or remove the folder")
    if len(classes) == 1:
        raise InputError(f"there is only one class, {classes[0]}; a classifier needs at least two class folders")


def _nothing_found(others: _LeftOutFiles, broken: _LeftOutFiles) -> str:
    found = f"no {_KINDS} image found among {others.folders.total()} files"
    if broken.folders:
        count = broken.folders.total()
        return f"{found} and {count} broken links, for example {broken.example}; fetch what they point to first"
    example = f", for example {others.example}" if others.example else ""
    return escaped(f"{found}{example}; put images into one folder per class")


def _losses(others: _LeftOutFiles, roots: Roots) -> Counter[str]:
    lost = Counter[str]()
    for folder, count in others.folders.items():
        if place := _place_of_path(folder, roots):
            lost[place.name] += count
    return lost


def _remark(others: _LeftOutFiles, lost: Counter[str], root: str) -> str:
    if not others.folders:
        return ""
    most = sorted(lost.items(), key=lambda item: (-item[1], item[0]))
    named = ", ".join(f"{name} {count}" for name, count in most[:_MAX_NAMED])
    more = f" and {len(most) - _MAX_NAMED} more classes" if len(most) > _MAX_NAMED else ""
    per_class = f" ({named}{more})" if named else ""
    example = others.example.removeprefix(root)  # an archive may hold the folder itself, and is the same dataset
    return escaped(f"{others.folders.total()} {others.kind} were left out{per_class}, for example {example}")
