"""An image's split is a function of the seed and its content."""

import hashlib

import numpy as np
import pytest

from cnn.data.splits import TEST, TRAIN, UNDECIDED, VAL, assign, content_keys, group_keys, thin_out

DIGESTS = [hashlib.sha256(str(number).encode()).digest() for number in range(20_000)]


def undecided(count: int) -> np.ndarray:
    return np.full(count, UNDECIDED, dtype=np.int8)


def test_adding_images_moves_none_between_splits() -> None:
    before = assign(undecided(5000), content_keys(0, DIGESTS[:5000]), val_fraction=0.1, test_fraction=0.15)
    shuffled = [DIGESTS[i] for i in np.random.default_rng(0).permutation(len(DIGESTS))]
    after = assign(undecided(20_000), content_keys(0, shuffled), val_fraction=0.1, test_fraction=0.15)
    now = dict(zip(shuffled, after.tolist(), strict=True))
    assert [now[digest] for digest in DIGESTS[:5000]] == before.tolist()


def test_the_split_of_a_group_depends_on_the_seed_and_its_name_only() -> None:
    keys = content_keys(0, DIGESTS)
    names = [None if number % 10 == 0 else f"patient {number // 7}" for number in range(len(DIGESTS))]
    grouped = group_keys(0, names, keys)
    alone = [number for number, name in enumerate(names) if name is None]
    assert (grouped[alone] == keys[alone]).all()
    of_group = {name: {key for other, key in zip(names, grouped, strict=True) if other == name} for name in names[1:50]}
    assert all(len(each) == 1 for name, each in of_group.items() if name)
    assert group_keys(0, ["patient 3"], keys[:1])[0] in of_group["patient 3"]
    assert group_keys(1, ["patient 3"], keys[:1])[0] not in of_group["patient 3"]
    found = assign(undecided(20_000), grouped, val_fraction=0.1, test_fraction=0.15)
    assert 0.13 < (found == TEST).mean() < 0.17


def test_raising_the_validation_share_moves_no_test_image() -> None:
    keys = content_keys(0, DIGESTS)
    few = assign(undecided(20_000), keys, val_fraction=0.1, test_fraction=0.15)
    many = assign(undecided(20_000), keys, val_fraction=0.4, test_fraction=0.15)
    assert ((few == TEST) == (many == TEST)).all()
    assert (many[few == VAL] == VAL).all()


def test_shares_are_as_configured() -> None:
    splits = assign(undecided(20_000), content_keys(3, DIGESTS), val_fraction=0.1, test_fraction=0.15)
    assert (splits == TEST).mean() == pytest.approx(0.15, abs=0.01)
    assert (splits == VAL).mean() == pytest.approx(0.085, abs=0.01)  # a tenth of what is not test


def test_another_seed_gives_another_split() -> None:
    one, two = (
        assign(undecided(1000), content_keys(seed, DIGESTS[:1000]), val_fraction=0.1, test_fraction=0.15)
        for seed in (0, 1)
    )
    assert (one != two).any()


def test_official_splits_stay_and_only_missing_ones_are_made() -> None:
    official = np.full(20_000, TRAIN, dtype=np.int8)
    official[:100] = TEST
    splits = assign(official, content_keys(0, DIGESTS), val_fraction=0.1, test_fraction=0.15)
    assert (splits[:100] == TEST).all() and (splits[100:] != TEST).all()
    assert (splits[100:] == VAL).mean() == pytest.approx(0.1, abs=0.01)

    official[100:200] = VAL
    splits = assign(official, content_keys(0, DIGESTS), val_fraction=0.1, test_fraction=0.15)
    assert splits.tolist() == official.tolist()


def test_a_limit_keeps_every_class_before_any_twice() -> None:
    labels = np.repeat([0, 1, 2], [900, 90, 10]).astype(np.int64)
    splits = np.zeros(1000, dtype=np.int8)
    splits[::2] = TEST
    keys = content_keys(0, DIGESTS[:1000])
    kept = thin_out(splits, labels, keys, 20)
    for split in (TRAIN, TEST):
        counts = np.bincount(labels[kept == split], minlength=3)
        assert counts[2] == 5  # all there are
        assert sorted(counts[:2]) == [7, 8]
    assert (kept[kept != UNDECIDED] == splits[kept != UNDECIDED]).all()


def test_a_limit_keeps_the_same_images_whatever_their_order() -> None:
    labels = np.arange(1000) % 4
    order = np.random.default_rng(1).permutation(1000)
    keys, splits = content_keys(0, DIGESTS[:1000]), np.zeros(1000, dtype=np.int8)
    kept = thin_out(splits, labels, keys, 50)
    assert (thin_out(splits[order], labels[order], keys[order], 50) == kept[order]).all()


def test_a_limit_above_the_number_of_images_keeps_all() -> None:
    splits = np.zeros(10, dtype=np.int8)
    assert (thin_out(splits, np.arange(10) % 2, content_keys(0, DIGESTS[:10]), 100) == TRAIN).all()
