"""Data checks on the digits, and on digits that something was done to."""

import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from cnn.config.data_checks import DataGateConfig
from cnn.config.preprocessing import Resize
from cnn.data.checks import BLOCK_BYTES, DataCheck, DataChecks, check_dataset, population_stability_index
from cnn.data.manifest import Losses, Manifest, SplitInfo, Spread, Unreadable
from cnn.data.mapped_split import MappedSplit
from cnn.data.shard_writer import ShardWriter, shard_path
from cnn.data.splits import SPLITS, Split
from cnn.formats.decode import Target, fit
from tests.cnn.conftest import Packed

Data = dict[Split, tuple[np.ndarray, np.ndarray]]


@pytest.fixture
def data(digits: Packed) -> Data:
    """Copies of the images uint8 N×1×8×8 and labels of each split, without what is there twice."""
    seen: set[bytes] = set()
    found: Data = {}
    for name in SPLITS:
        images, labels = (tensor.numpy().copy() for tensor in digits.split(name).slice(0, 10_000))
        new = [not (image.tobytes() in seen or seen.add(image.tobytes())) for image in images]
        found[name] = images[new], labels[new]
    return found


@pytest.fixture
def check(digits: Packed, tmp_path: Path) -> Callable[..., DataChecks]:
    """Pack the images and check them, in the company of a champion if there is one."""

    def packed(data: Data, **changes: object) -> tuple[Manifest, dict[Split, MappedSplit]]:
        infos, splits = {}, {}
        for name, (images, labels) in data.items():
            writer = ShardWriter(tmp_path, images.shape[1:], shard_bytes=BLOCK_BYTES // 100)
            writer.add(images, labels)
            shards = writer.close()
            counts = np.bincount(labels, minlength=10).tolist()
            infos[name] = SplitInfo(count=len(labels), class_counts=tuple(counts), shards=shards)
            splits[name] = MappedSplit([shard_path(tmp_path, shard.sha256) for shard in shards])
        return digits.manifest.model_copy(update={"splits": infos, **changes}), splits

    def run(  # type: ignore[no-untyped-def]
        data: Data,
        champion: Data | None = None,
        config: DataGateConfig | None = None,
        oldest: Data | None = None,
        images_for_margin: int = 0,
        **changes: object,
    ):
        manifest, splits = packed(data, **changes)
        theirs, first = (
            (found[0], found[1]["train"]) if (found := other and packed(other)) else None
            for other in (champion, oldest)
        )
        return check_dataset(
            manifest,
            splits,
            config or DataGateConfig(),
            theirs,
            oldest=first,
            images_for_margin=images_for_margin,
        )

    return run


def found(checks: DataChecks, name: str) -> DataCheck:
    (check,) = (check for check in checks.checks if check.name == name)
    return check


def offenders(checks: DataChecks, kind: str) -> Iterable[tuple[str, int, str]]:
    return [(each.split, each.index, each.note) for each in checks.offenders if each.check == kind]


def test_the_digits_pass(data: Data, check: Callable[..., DataChecks]) -> None:
    checks = check(data, champion=data, oldest=data)
    assert checks.outcome == "passed"
    assert {each.outcome for each in checks.checks} == {"passed"}
    assert (found(checks, "class_drift").value, found(checks, "pixel_drift").value) == (0.0, 0.0)
    assert not checks.offenders
    assert {name: split.images for name, split in checks.splits.items()} == {n: len(data[n][1]) for n in SPLITS}
    assert np.sum(checks.pixels) == pytest.approx(1)
    assert DataChecks.model_validate_json(checks.model_dump_json()) == checks


def test_every_image_is_looked_at_once(digits: Packed) -> None:
    splits = {name: digits.split(name) for name in SPLITS}
    done: list[int] = []
    checks = check_dataset(digits.manifest, splits, DataGateConfig(), on_progress=done.append)
    assert sum(done) == 1797
    values = digits.split("train").slice(0, 10_000)[0].flatten() // 16
    assert checks.pixels[0] == pytest.approx((values.bincount(minlength=16) / len(values)).tolist())


def test_repeated_images_are_counted_and_named(data: Data, check: Callable[..., DataChecks]) -> None:
    images, labels = data["train"]
    count = len(images)
    data["train"] = np.concatenate([images, images[:100]]), np.concatenate([labels, labels[:100]])
    checks = check(data)
    duplicates = found(checks, "duplicates")
    assert (checks.splits["train"].duplicates, checks.splits["val"].duplicates) == (100, 0)
    assert (duplicates.outcome, duplicates.value) == ("warned", pytest.approx(100 / (count + 100)))
    assert offenders(checks, "duplicates")[0] == ("train", count, "equals train 0")
    assert len(offenders(checks, "duplicates")) == 8
    assert found(checks, "conflicts").value == 0
    assert checks.outcome == "warned"


@pytest.mark.parametrize("into, source", [("test", "train"), ("test", "val"), ("val", "train")])
def test_images_of_another_split_are_leakage(
    data: Data, check: Callable[..., DataChecks], into: Split, source: Split
) -> None:
    images, labels = data[into]
    images[:3], labels[:3] = data[source][0][5:8], data[source][1][5:8]
    checks = check(data)
    leakage = found(checks, "leakage")
    assert (leakage.outcome, leakage.value) == ("failed", pytest.approx(3 / len(images)))
    assert offenders(checks, "leakage")[0] == (into, 0, f"equals {source} 5")
    assert (checks.outcome, checks.with_outcome("failed")) == ("failed", (leakage,))


def test_groups_in_several_splits_are_leakage(digits: Packed) -> None:
    splits = {name: digits.split(name) for name in SPLITS}

    def groups(**given: dict[int, str]) -> dict[Split, list[str | None]]:
        return {name: [given.get(name, {}).get(row) for row in range(len(split))] for name, split in splits.items()}

    def found(groups: dict[Split, list[str | None]] | None, config: DataGateConfig) -> DataCheck | None:
        checks = check_dataset(digits.manifest, splits, config, groups=groups).checks
        return next((check for check in checks if check.name == "group_leakage"), None)

    config = DataGateConfig()
    assert found(None, config) is found(groups(), config) is None
    check = found(groups(train={0: "a", 1: "b"}, val={0: "c"}, test={0: "d", 5: "d"}), config)
    assert check and check.outcome == "passed"
    crossing = groups(train={0: "a", 1: "b"}, val={0: "c", 1: "b"}, test={0: "c", 1: "a", 2: "d"})
    check = found(crossing, config)
    images = len(splits["val"]), len(splits["test"])
    assert check and check.outcome == "failed" and check.value == pytest.approx(max(1 / images[0], 2 / images[1]))
    assert check.note == (
        f"images of groups of earlier splits: val 1 of {images[0]}, test 2 of {images[1]}, for example of group a"
    )
    check = found(crossing, DataGateConfig(max_group_leakage=0.5))
    assert check and check.outcome == "passed"


def test_equal_images_with_different_labels_are_conflicts(data: Data, check: Callable[..., DataChecks]) -> None:
    images, labels = data["train"]
    images[0], labels[0] = images[1], (labels[1] + 1) % 10
    data["test"][0][4], data["test"][1][4] = images[2], labels[2]  # leakage, but no conflict
    checks = check(data)
    assert checks.splits["train"].conflicts == 2
    assert found(checks, "conflicts").value == pytest.approx(2 / sum(len(data[name][1]) for name in SPLITS))
    assert offenders(checks, "conflicts") == [("train", 0, "equals train 1"), ("train", 1, "equals train 0")]


def test_constant_and_blank_images_are_told_apart(data: Data, check: Callable[..., DataChecks]) -> None:
    images, _ = data["val"]
    images[0], images[1] = 77, 255  # of one colour
    images[2] = 200
    images[2, 0, 3, 3] = 208  # eight levels
    images[3] = 200
    images[3, 0, 3, 3] = 209
    checks = check(data)
    facts = checks.splits["val"]
    assert (facts.constant, facts.blank, facts.leaked, facts.duplicates) == (2, 1, 0, 0)
    assert (found(checks, "constant").outcome, found(checks, "constant").value) == ("failed", 2 / len(images))
    assert offenders(checks, "constant") == [("val", 0, "contrast 0"), ("val", 1, "contrast 0")]
    assert offenders(checks, "blank") == [("val", 2, "contrast 8")]


def test_coloured_image_of_equal_brightness_is_not_blank(data: Data, check: Callable[..., DataChecks]) -> None:
    rgb = {name: (np.repeat(images, 3, axis=1), labels) for name, (images, labels) in data.items()}
    images = rgb["test"][0]
    images[0] = np.array([10, 100, 200])[:, None, None]
    images[1] = images[0]
    images[1, 2, 0, 0] = 0  # only blue has a mark
    checks = check(rgb, channels=3)
    assert (checks.splits["test"].constant, checks.splits["test"].blank) == (1, 0)
    assert len(checks.pixels) == 3


def test_rare_class_is_named(data: Data, check: Callable[..., DataChecks]) -> None:
    images, labels = data["train"]
    kept = np.flatnonzero((labels != 8) | (np.cumsum(labels == 8) <= 5))
    data["train"] = images[kept], labels[kept]
    checks = check(data)
    rare, imbalance = found(checks, "class_images"), found(checks, "imbalance")
    assert (rare.value, rare.limit, rare.outcome) == (5, 10, "warned")
    assert "training images of 8" in rare.note
    assert imbalance.value == np.bincount(labels[kept]).max() / 5
    assert imbalance.outcome == "warned"


def test_what_preprocessing_found_is_judged(digits: Packed, data: Data, check: Callable[..., DataChecks]) -> None:
    report = digits.manifest.report.model_copy(
        update={
            "packed": 90,
            "unreadable": 10,
            "unreadable_examples": (Unreadable(name="3/a.png", reason="truncated"),),
            "width": Spread(min=10, median=20, max=100),
            "modes": {"L": 1, "RGB": 9},
        }
    )
    checks = check(data, report=report)
    assert found(checks, "unreadable").value == 0.1
    assert "3/a.png (truncated)" in found(checks, "unreadable").note
    assert found(checks, "size_ratio").value == 10
    assert found(checks, "other_modes").value == pytest.approx(0.1)
    assert [each.name for each in checks.with_outcome("warned")] == ["unreadable", "size_ratio"]


def test_a_class_that_loses_most_of_its_files_is_warned_of(
    digits: Packed, data: Data, check: Callable[..., DataChecks]
) -> None:
    def report(**left_out: int) -> dict[str, object]:
        losses = {name[1:]: Losses(images=100, left_out=count) for name, count in left_out.items()}
        return {"report": digits.manifest.report.model_copy(update={"left_out": losses})}

    assert found(check(data, **report()), "left_out").outcome == "passed"
    assert found(check(data, **report(_3=100)), "left_out").outcome == "passed"
    checks = check(data, **report(_3=9, _5=300))
    assert (found(checks, "left_out").outcome, found(checks, "left_out").value) == ("warned", 0.75)
    assert found(checks, "left_out").note == "5 300 besides 100, 3 9 besides 100 images"
    assert found(check(data, config=DataGateConfig(left_out="fail"), **report(_5=101)), "left_out").outcome == "failed"


def test_classes_are_compared_with_the_champions_by_name(data: Data, check: Callable[..., DataChecks]) -> None:
    names = (*"012345678", "ten")
    checks = check(data, champion=data, classes=names)
    missing, new = found(checks, "missing_classes"), found(checks, "new_classes")
    assert (missing.outcome, missing.value, missing.note) == ("failed", 1, "9")
    assert (new.outcome, new.value, new.note) == ("warned", 1, "ten")
    assert found(checks, "class_drift").outcome == "warned"  # a tenth of the images went to another name
    assert found(checks, "pixel_drift").value == 0


def test_other_pixels_and_other_proportions_are_drift(data: Data, check: Callable[..., DataChecks]) -> None:
    images, labels = data["train"]
    inverted = data | {"train": (255 - images, labels)}
    checks = check(inverted, champion=data)
    assert found(checks, "class_drift").value == 0
    assert found(checks, "pixel_drift").outcome == "warned"
    few = labels < 3
    order = np.concatenate([np.flatnonzero(~few)[:100], np.flatnonzero(few)])
    shifted = data | {"train": (images[order], labels[order])}
    checks = check(shifted, champion=data)
    before, now = np.bincount(labels) / len(labels), np.bincount(labels[order]) / len(order)
    assert found(checks, "class_drift").value == pytest.approx(((now - before) * np.log(now / before)).sum())
    assert found(checks, "class_drift").outcome == "warned"
    assert found(checks, "pixel_drift").outcome == "passed"


def test_without_a_champion_nothing_is_compared(data: Data, check: Callable[..., DataChecks]) -> None:
    checks = check(data)
    names = [each.name for each in checks.with_outcome("skipped")]
    compared = ["missing_classes", "new_classes", "class_drift", "pixel_drift", "trained_on"]
    assert names == [*compared, "slow_class_drift", "slow_pixel_drift"]
    assert checks.outcome == "passed"


def test_small_drifts_add_up_against_the_oldest_champion(data: Data, check: Callable[..., DataChecks]) -> None:
    """Half of the classes lose a third of their images, and then another third of the rest."""
    images, labels = data["train"]
    steps = []
    for ninths in (9, 6, 4):
        kept = (labels < 5) | (np.cumsum(labels >= 5) % 9 < ninths)
        steps.append(data | {"train": (images[kept], labels[kept])})
    strict = DataGateConfig(max_class_drift=0.1, max_slow_class_drift=0.1, slow_class_drift="fail")
    checks = check(steps[2], champion=steps[1], oldest=steps[0], config=strict)
    assert [each.name for each in checks.with_outcome("failed")] == ["slow_class_drift"]
    assert found(checks, "class_drift").outcome == "passed"


def test_test_images_that_the_champion_was_trained_on_are_counted(data: Data, check: Callable[..., DataChecks]) -> None:
    """Another seed of the split moves images; one that both were trained on is leakage, and counted as such."""
    theirs = {name: (images.copy(), labels.copy()) for name, (images, labels) in data.items()}
    theirs["train"][0][:9] = data["test"][0][:9]
    data["train"][0][0], data["train"][1][0] = data["test"][0][0], data["test"][1][0]
    learned = found(check(data, champion=theirs), "trained_on")
    assert (learned.outcome, learned.value) == ("warned", pytest.approx(8 / len(data["test"][1])))
    assert "the champion was trained on 8 of" in learned.note
    assert found(check(data, champion=data), "trained_on").value == 0


def test_split_that_can_never_show_the_margin_is_named_before_training(
    data: Data, check: Callable[..., DataChecks]
) -> None:
    images = len(data["test"][1])
    few = found(check(data, images_for_margin=600), "test_images")
    assert (few.outcome, few.value, few.limit) == ("warned", images, 600)
    assert "no version can pass against a champion: it needs 600" in few.note
    assert found(check(data, images_for_margin=images), "test_images").outcome == "passed"


def test_pixels_of_another_number_of_channels_are_not_compared(data: Data, check: Callable[..., DataChecks]) -> None:
    rgb = {name: (np.repeat(images, 3, axis=1), labels) for name, (images, labels) in data.items()}
    drift = found(check(rgb, champion=data, channels=3), "pixel_drift")
    assert (drift.outcome, drift.note) == ("skipped", "3 channels; the champion's data have 1")


@pytest.mark.parametrize("level, outcome", [("off", "passed"), ("warn", "warned"), ("fail", "failed")])
def test_level_and_limit_decide(data: Data, check: Callable[..., DataChecks], level: str, outcome: str) -> None:
    data["test"][0][:5] = data["train"][0][:5]
    share = 5 / len(data["test"][0])
    strict = DataGateConfig.model_validate({"leakage": level, "conflicts": "off"})
    checks = check(data, config=strict)
    assert checks.outcome == outcome
    assert found(checks, "leakage").value == pytest.approx(share)
    assert bool(offenders(checks, "leakage")) == (level != "off")
    lenient = strict.model_copy(update={"max_leakage": share})
    assert check(data, config=lenient).outcome == "passed"


def test_stability_index_of_known_histograms() -> None:
    assert population_stability_index([10, 30], [1, 3]) == pytest.approx(0)
    expected = (0.5 - 0.25) * np.log(0.5 / 0.25) + (0.5 - 0.75) * np.log(0.5 / 0.75)
    assert population_stability_index([1, 3], [7, 7]) == pytest.approx(expected)
    assert population_stability_index([1, 0], [0, 1]) == pytest.approx(2 * (1 - 1e-4) * np.log(1e4))


def test_memory_does_not_grow_with_the_images(tmp_path: Path, digits: Packed) -> None:
    rng = np.random.default_rng(0)
    data = {"train": 3000, "val": 5, "test": 5}
    infos, splits = {}, {}
    for name, count in data.items():
        writer = ShardWriter(tmp_path, (1, 128, 128))
        writer.add(rng.integers(0, 256, (count, 1, 128, 128), dtype=np.uint8), np.zeros(count, dtype=np.int64))
        shards = writer.close()
        infos[name] = SplitInfo(count=count, class_counts=(count, *[0] * 9), shards=shards)
        splits[name] = MappedSplit([shard_path(tmp_path, shard.sha256) for shard in shards])
    manifest = digits.manifest.model_copy(update={"splits": infos})
    tracemalloc.start()
    check_dataset(manifest, splits, DataGateConfig())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 32 * 2**20 < 3000 * 128 * 128


def test_configuration_is_read_without_torch() -> None:
    code = "import sys, cnn.data.checks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_labels_are_those_of_the_split(data: Data, check: Callable[..., DataChecks]) -> None:
    data["test"][0][7] = 0
    (offender,) = check(data).offenders
    assert offender.label == data["test"][1][7]


@pytest.mark.parametrize("resize", get_args(Resize))
def test_blank_rectangles_are_found_whatever_makes_them_square(
    data: Data, check: Callable[..., DataChecks], resize: Resize
) -> None:
    images, labels = data["train"]
    blank = np.full((20, 50), 200, dtype=np.uint8)
    images[0] = fit(Image.fromarray(blank), Target(8, 1, resize))
    blank[:, 25:] += 4
    images[1] = fit(Image.fromarray(blank), Target(8, 1, resize))
    checks = check(data | {"train": (images, labels)})
    assert offenders(checks, "constant") == [("train", 0, "contrast 0")]
    assert offenders(checks, "blank") == [("train", 1, "contrast 4")]
