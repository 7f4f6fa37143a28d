"""Assigns images to splits: a pure function of the seed and of the image's own content.

So new images never move an old image from the test split into training, and equal images share a split. Each image
has a *key*, a uniform 64-bit number; a split is a range of keys.
"""

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
"""Images [n, C, H, W], values 0..255."""

Split = Literal["train", "val", "test"]

SPLITS: tuple[Split, ...] = ("train", "val", "test")
"""Arrays of splits contain positions in this tuple."""

TRAIN, VAL, TEST = 0, 1, 2
UNDECIDED = -1
"""The split of an image to which the source assigns none; after `assign`, of an image that is left out."""


def content_keys(seed: int, digests: Sequence[bytes]) -> NDArray[np.uint64]:
    """Returns the key of each image: the first 8 bytes of SHA-256(seed, content digest)."""
    start = hashlib.sha256(seed.to_bytes(8, "little"))
    keys = bytearray()
    for digest in digests:
        state = start.copy()
        state.update(digest)
        keys += state.digest()[:8]
    return np.frombuffer(keys, dtype=">u8").astype(np.uint64)


def group_keys(seed: int, groups: Sequence[str | None], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Returns keys that are equal within a group: a pure function of seed and group.

    Args:
        groups: of each image; None for an image that keeps its own key.
        keys: of each image, from `content_keys`.
    """
    names = sorted({group for group in groups if group is not None})
    shared = dict(zip(names, content_keys(seed, [b"group " + name.encode() for name in names]), strict=True))
    pairs = zip(groups, keys, strict=True)
    return np.fromiter((key if group is None else shared[group] for group, key in pairs), np.uint64, len(keys))


def assign(
    official: NDArray[np.int8], keys: NDArray[np.uint64], *, val_fraction: float, test_fraction: float
) -> NDArray[np.int8]:
    """Returns the split of each image, as positions in `SPLITS`.

    Official validation and test splits stay as they are. If the source has no test split, `test_fraction` of the
    other images become one; if it has no validation split, `val_fraction` of the remaining images become one.
    """
    hold_test = 0.0 if (official == TEST).any() else test_fraction
    hold_val = 0.0 if (official == VAL).any() else (1 - hold_test) * val_fraction
    below_test, below_val = (np.uint64(int(share * 2**64)) for share in (hold_test, hold_test + hold_val))
    splits = np.where(keys < below_test, TEST, np.where(keys < below_val, VAL, TRAIN))
    return np.where(official >= VAL, official, splits).astype(np.int8)


def thin_out(
    splits: NDArray[np.int8], labels: NDArray[np.int64], keys: NDArray[np.uint64], limit: int
) -> NDArray[np.int8]:
    """Keeps at most `limit` images of each split; the others become `UNDECIDED`.

    The classes take turns, and each adds its images in the order of their keys, so no class has a second image before
    all classes have one.
    """
    kept = np.full_like(splits, UNDECIDED)
    for split in range(len(SPLITS)):
        members = np.flatnonzero(splits == split)
        by_class = members[np.lexsort((keys[members], labels[members]))]
        starts = np.searchsorted(labels[by_class], labels[by_class])  # of each image's class
        turns = np.arange(len(by_class)) - starts
        chosen = by_class[np.lexsort((by_class, keys[by_class], turns))[:limit]]
        kept[chosen] = split
    return kept
