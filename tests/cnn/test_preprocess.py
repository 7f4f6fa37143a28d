"""Preprocessing of real images: the packed images, their splits, and the report."""

import gzip
import hashlib
import io
import itertools
import struct
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import sklearn.datasets
from PIL import Image
from safetensors.numpy import load_file
from sklearn.datasets import load_digits

from cnn.config.preprocessing import MAX_PRETRAINED_SIZE, PreprocessConfig, Resize
from cnn.data.manifest import Manifest
from cnn.data.shard_writer import ShardWriter, shard_path
from cnn.errors import InputError
from cnn.formats import open_source
from cnn.formats.decode import Target, decode_image
from cnn.formats.files import LocalFiles
from cnn.preprocessing.pack import code_files, pack, preprocess, shard_bytes
from cnn.preprocessing.pixel_statistics import PixelSums, moments
from cnn.preprocessing.resume_records import PackedShard, SurveyPart
from cnn.preprocessing.survey import survey
from cnn.threads import READER_THREADS, in_order

DIGITS = load_digits()
PIXELS = np.round(DIGITS.images * 255 / 16).astype(np.uint8)
CONFIG = PreprocessConfig()


@pytest.fixture
def digits(tmp_path: Path) -> dict[str, Path]:
    path = tmp_path / "digits"
    path.write_bytes(gzip.decompress((Path(sklearn.datasets.__path__[0]) / "data" / "digits.csv.gz").read_bytes()))
    return {"digits.csv": path}


class Folder:
    """Image files and the paths they have in a source."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.files: dict[str, Path] = {}

    def add(self, path: str, image: Image.Image | np.ndarray | bytes, format: str = "PNG") -> None:
        if not isinstance(image, bytes):
            buffer = io.BytesIO()
            (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, format)
            image = buffer.getvalue()
        local = self._root / f"image-{len(self.files)}"
        local.write_bytes(image)
        self.files[path] = local

    def add_digits(self, numbers: Iterable[int], prefix: str = "") -> None:
        for number in numbers:
            self.add(f"{prefix}{DIGITS.target[number]}/{number}.png", PIXELS[number])

    def add_rectangles(self, numbers: Iterable[int]) -> None:
        """Adds colour images of two classes, wide and tall ones."""
        for number in numbers:
            shape = (12 + number % 7, 20 - number % 11, 3)
            pixels = np.arange(np.prod(shape)).reshape(shape) * (number + 7) % 251
            self.add(f"{number % 2}/rectangle-{number}.png", pixels.astype(np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    (tmp_path / "images").mkdir()
    return Folder(tmp_path / "images")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    path = tmp_path / "out"
    path.mkdir()
    return path


def unpack(out: Path, manifest: Manifest, split: str) -> tuple[np.ndarray, np.ndarray]:
    shards = [load_file(shard_path(out, shard.sha256)) for shard in manifest.splits[split].shards]  # type: ignore[index]
    return tuple(np.concatenate([shard[name] for shard in shards]) for name in ("images", "labels"))  # type: ignore[return-value]


def as_set(images: np.ndarray, labels: np.ndarray) -> set[tuple[bytes, int]]:
    return {(image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)}


# --- what is packed -------------------------------------------------------------------------------


def test_every_image_is_in_exactly_one_split_unchanged(digits: dict[str, Path], out: Path) -> None:
    manifest = preprocess("digits", digits, CONFIG, out)
    parts = {split: unpack(out, manifest, split) for split in manifest.splits}
    assert sum(len(labels) for _, labels in parts.values()) == 1797
    assert set.union(*(as_set(*part) for part in parts.values())) == as_set(PIXELS, DIGITS.target)
    for one, two in itertools.combinations(parts.values(), 2):
        assert not as_set(*one) & as_set(*two)
    for split, info in manifest.splits.items():
        images, labels = parts[split]
        assert images.dtype == np.uint8 and images.shape[1:] == (1, 8, 8) and labels.dtype == np.int64
        assert np.bincount(labels, minlength=10).tolist() == list(info.class_counts)
        assert info.count == len(images) == sum(shard.count for shard in info.shards)


def test_mean_and_std_are_those_of_the_whole_training_split(digits: dict[str, Path], out: Path) -> None:
    manifest = preprocess("digits", digits, CONFIG, out)
    images, _ = unpack(out, manifest, "train")
    assert manifest.mean == pytest.approx([(images / 255).mean()], rel=1e-12)
    assert manifest.std == pytest.approx([(images / 255).std()], rel=1e-12)


def test_channel_sums_are_exact_however_images_arrive() -> None:
    images = np.random.default_rng(0).integers(0, 256, (1000, 3, 8, 8), dtype=np.uint8)
    images[:, 2] = 7
    together = PixelSums.of(moments(images), 64)
    first, *others = (PixelSums.of(moments(part), 64) for part in np.array_split(images[::-1], 7))
    apart = sum(others, first)
    assert (together.mean(), together.std()) == (apart.mean(), apart.std())
    assert together.mean() == pytest.approx((images / 255).mean((0, 2, 3)), rel=1e-12)
    assert together.std()[:2] == pytest.approx((images / 255).std((0, 2, 3))[:2], rel=1e-12)
    assert together.std()[2] == 1 / 255  # of a constant channel: one grey level, so that it can be divided by


def test_two_runs_give_byte_equal_shards_and_one_version(digits: dict[str, Path], tmp_path: Path) -> None:
    runs = []
    for name in ("one", "two"):
        out = tmp_path / name
        out.mkdir()
        manifest = preprocess("digits", digits, CONFIG, out)
        runs.append((manifest.version, {path.name: path.read_bytes() for path in out.iterdir()}))
        for split in manifest.splits.values():
            for shard in split.shards:
                content = shard_path(out, shard.sha256).read_bytes()
                assert hashlib.sha256(content).hexdigest() == shard.sha256
                assert len(content) == shard.bytes
    assert runs[0] == runs[1]


def test_shards_are_of_the_stated_size_and_in_source_order(digits: dict[str, Path], out: Path) -> None:
    source = open_source("digits", digits)
    plan = survey(source, CONFIG)
    manifest = pack(source, plan, PreprocessConfig(shard_bytes=100 * 64), out).manifest
    assert [shard.count for shard in manifest.splits["train"].shards[:-1]] == [100] * (
        manifest.splits["train"].count // 100
    )
    for position, split in enumerate(("train", "val", "test")):
        images, labels = unpack(out, manifest, split)
        assert (images[:, 0] == PIXELS[plan.splits == position]).all()
        assert (labels == DIGITS.target[plan.splits == position]).all()


def test_shards_do_not_depend_on_how_images_arrive(tmp_path: Path) -> None:
    images, labels = PIXELS[:, None], DIGITS.target.astype(np.int64)
    results = []
    for step in (1, 64, 700, 1797):
        writer = ShardWriter(tmp_path, (1, 8, 8), shard_bytes=500 * 64)
        for start in range(0, len(images), step):
            writer.add(images[start : start + step], labels[start : start + step])
        results.append(writer.close())
    assert all(result == results[0] for result in results)
    assert [shard.count for shard in results[0]] == [500, 500, 500, 297]
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.long
def test_a_folder_and_a_zip_of_it_give_one_version_per_way_to_a_square(
    folder: Folder, tmp_path: Path, out: Path
) -> None:
    folder.add_digits(range(300))
    folder.add_rectangles(range(60))
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        for path, local in reversed(folder.files.items()):
            archive.write(local, f"digits/{path}")
    versions = set()
    for resize in get_args(Resize):
        config = PreprocessConfig(resize=resize)
        one = preprocess("folder", folder.files, config, out)
        assert preprocess("archive", {"digits.zip": tmp_path / "zip"}, config, out).version == one.version
        assert one.resize == resize and Manifest.from_bytes(one.to_bytes()) == one
        versions.add(one.version)
    assert len(versions) == 3


def test_data_that_are_cropped_keep_the_version_that_they_had_before_there_was_a_choice(
    folder: Folder, out: Path
) -> None:
    folder.add_rectangles(range(60))
    manifest = preprocess("folder", folder.files, PreprocessConfig(resize="crop"), out)
    assert manifest.version == "fc78dccd61cabb15ceed504a72c15955415eb028dc5bc8cf4274bf65d76fddfb"


@pytest.mark.parametrize("resize", get_args(Resize))
@pytest.mark.parametrize("shape", [(40, 20), (20, 40)])
def test_arrays_of_rectangles_become_squares_as_files_do(
    tmp_path: Path, out: Path, resize: Resize, shape: tuple[int, int]
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, *shape), dtype=np.uint8)
    files = {
        "train-images-idx3-ubyte": struct.pack(">4I", 0x803, 6, *shape) + images.tobytes(),
        "train-labels-idx1-ubyte": struct.pack(">2I", 0x801, 6) + bytes([0, 1] * 3),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (block,) = open_source("idx", {name: tmp_path / name for name in files}).blocks()
    found = block.decode(np.ones(6, dtype=np.bool_), Target(16, 1, resize)).images
    for array, image in zip(images, found, strict=True):
        file = io.BytesIO()
        Image.fromarray(array).save(file, "PNG")
        assert (decode_image(file.getvalue(), Target(16, 1, resize)) == image).all()


@pytest.mark.long
def test_arrays_and_files_are_resized_alike(digits: dict[str, Path], folder: Folder, out: Path) -> None:
    config = PreprocessConfig(image_size=20, channels=3)
    folder.add_digits(range(1797))
    from_array = preprocess("digits", digits, config, out)
    from_files = preprocess("folder", folder.files, config, out)
    packed = [
        set.union(*(as_set(*unpack(out, manifest, split)) for split in manifest.splits))
        for manifest in (from_array, from_files)
    ]
    assert packed[0] == packed[1]
    assert (from_array.channels, from_array.image_size) == (3, 20)


# --- splits ---------------------------------------------------------------------------------------


@pytest.mark.long
def test_more_images_and_classes_move_none_between_splits(folder: Folder, out: Path) -> None:
    folder.add_digits(range(400))
    before = preprocess("folder", folder.files, CONFIG, out)
    folder.add_digits(range(400, 1200))
    folder.add_digits(range(1200, 1500), prefix="more-")
    after = preprocess("folder", folder.files, CONFIG, out)
    for split in before.splits:
        images_before, images_after = (unpack(out, manifest, split)[0] for manifest in (before, after))
        assert {image.tobytes() for image in images_before} <= {image.tobytes() for image in images_after}


def test_split_folders_are_kept_as_they_are(folder: Folder, out: Path) -> None:
    folder.add_digits(range(0, 200), "train/")
    folder.add_digits(range(200, 250), "val/")
    folder.add_digits(range(250, 330), "test/")
    manifest = preprocess("folder", folder.files, CONFIG, out)
    for split, numbers in (("train", slice(0, 200)), ("val", slice(200, 250)), ("test", slice(250, 330))):
        assert as_set(*unpack(out, manifest, split)) == as_set(PIXELS[numbers], DIGITS.target[numbers])


def test_a_limit_keeps_so_many_images_of_each_split_and_no_other(digits: dict[str, Path], out: Path) -> None:
    full = preprocess("digits", digits, CONFIG, out)
    limited = preprocess("digits", digits, PreprocessConfig(limit=50), out)
    for split, info in limited.splits.items():
        assert info.count == 50
        assert info.class_counts == (5,) * 10
        assert as_set(*unpack(out, limited, split)) < as_set(*unpack(out, full, split))
    with pytest.raises(InputError, match=r"data\.limit 5 leaves no training image of .*; set it to at least 10"):
        preprocess("digits", digits, PreprocessConfig(limit=5), out)


def test_an_empty_split_is_refused_with_advice(folder: Folder, out: Path) -> None:
    folder.add_digits(range(4))
    with pytest.raises(InputError, match=r"none of 4 images is in the (val|test) split; .*data\.(val|test)_fraction"):
        preprocess("folder", folder.files, CONFIG, out)


def test_a_class_without_training_images_is_refused_by_name(folder: Folder, out: Path) -> None:
    folder.add_digits(range(200), "train/")
    folder.add("test/eleven/1.png", PIXELS[0])
    with pytest.raises(InputError, match="no training image of class eleven"):
        preprocess("folder", folder.files, CONFIG, out)


def test_a_class_missing_in_validation_or_test_is_a_warning(folder: Folder, out: Path) -> None:
    folder.add_digits(range(200), "train/")
    folder.add_digits((n for n in range(200, 400) if DIGITS.target[n] != 3), "test/")
    manifest = preprocess("folder", folder.files, CONFIG, out)
    assert "the test split has no image of class 3" in manifest.report.warnings


# --- size and channels ----------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(200, 200)], 200),  # all squares of one size
        ([(40, 30)], 30),
        ([(400, 300)], 128),
        ([(20, 30), (50, 40), (300, 200)], 40),
        ([(500, 400), (200, 300), (1000, 900)], 128),
    ],
)
def test_an_unset_size_follows_the_images(
    folder: Folder, out: Path, sizes: list[tuple[int, int]], expected: int
) -> None:
    for number in range(60):
        size = sizes[number % len(sizes)]
        image = Image.fromarray(PIXELS[number]).resize(size)
        folder.add(f"{number // 3 % 2}/{number}.png", image)
    manifest = preprocess("folder", folder.files, CONFIG, out)
    assert manifest.image_size == expected
    assert unpack(out, manifest, "train")[0].shape[1:] == (1, expected, expected)
    assert (manifest.report.width.min, manifest.report.width.max) == (min(sizes)[0], max(sizes)[0])


@pytest.mark.long
@pytest.mark.parametrize(("size", "expected"), [((400, 300), 224), ((200, 160), 160), ((300, 300), 300)])
def test_an_unset_size_is_larger_for_pretrained_networks(folder: Folder, size: tuple[int, int], expected: int) -> None:
    for number in range(60):
        folder.add(f"{number // 3 % 2}/{number}.png", Image.fromarray(PIXELS[number]).resize(size))
    source = open_source("folder", folder.files)
    assert survey(source, CONFIG, max_default_size=MAX_PRETRAINED_SIZE).target.image_size == expected
    given = PreprocessConfig(image_size=256)
    assert survey(source, given, max_default_size=MAX_PRETRAINED_SIZE).target.image_size == 256


def test_one_colour_image_makes_the_dataset_colour(folder: Folder, out: Path) -> None:
    folder.add_digits(range(100))
    grey = preprocess("folder", folder.files, CONFIG, out)
    folder.add("1/colour.png", np.stack([PIXELS[1], PIXELS[2], PIXELS[3]], axis=2))
    colour = preprocess("folder", folder.files, CONFIG, out)
    assert (grey.channels, colour.channels) == (1, 3)
    assert (len(grey.mean), len(colour.std)) == (1, 3)
    assert colour.report.modes == {"L": 100, "RGB": 1}


# --- damage ---------------------------------------------------------------------------------------


def test_few_unreadable_images_are_named_and_left_out(folder: Folder, out: Path) -> None:
    folder.add_digits(range(398))
    folder.add("0/broken.png", folder.files["0/0.png"].read_bytes()[:-30])
    folder.add("1/text.jpg", b"no image at all")
    report = preprocess("folder", folder.files, CONFIG, out).report
    assert (report.images, report.packed, report.unreadable) == (400, 398, 2)
    assert [image.name for image in report.unreadable_examples] == ["0/broken.png", "1/text.jpg"]
    assert report.unreadable_examples[1].reason == "not a PNG, JPEG, WebP or BMP image"
    assert "2 images could not be read and were left out" in report.warnings


@pytest.mark.parametrize("size", [16, 300])
def test_unreadable_images_may_stand_alone_in_a_piece(
    size: int, folder: Folder, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As among large images, of which each is a piece."""
    monkeypatch.setattr("cnn.preprocessing.pack.PIECE_BYTES", 1)
    folder.add_digits(range(100))
    folder.add("0/broken.png", b"no image at all")
    config = PreprocessConfig(max_unreadable=0.1, image_size=size)
    report = preprocess("folder", folder.files, config, out).report
    assert (report.packed, report.unreadable) == (100, 1)


def test_many_unreadable_images_fail_with_names(folder: Folder, out: Path) -> None:
    folder.add_digits(range(100))
    for number in range(30):
        folder.add(f"3/bad-{number:02}.png", b"no image at all")
    with pytest.raises(InputError) as refusal:
        preprocess("folder", folder.files, CONFIG, out)
    message = str(refusal.value)
    assert "3/bad-00.png (not a PNG" in message and "data.max_unreadable" in message and "\n" not in message
    manifest = preprocess("folder", folder.files, PreprocessConfig(max_unreadable=0.5), out)
    assert manifest.report.unreadable == 30
    assert len(manifest.report.unreadable_examples) == 20


def test_a_source_without_one_readable_image_is_refused(folder: Folder, out: Path) -> None:
    for number in range(30):
        folder.add(f"{number % 2}/{number}.png", b"no image at all")
    with pytest.raises(InputError, match=r"not one of .* images can be read"):
        preprocess("folder", folder.files, PreprocessConfig(max_unreadable=1), out)


def test_images_that_cannot_be_decoded_do_not_decide_size_and_channels(folder: Folder, out: Path) -> None:
    folder.add_digits(range(60))
    expected = preprocess("folder", folder.files, CONFIG, out)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8))
    for number in range(70):  # they are the majority, and of another size and mode
        buffer = io.BytesIO()
        noise.rotate(number).save(buffer, "JPEG")
        folder.add(f"0/broken-{number}.jpg", buffer.getvalue()[:-500])
    config = PreprocessConfig(max_unreadable=0.9)
    assert survey(open_source("folder", folder.files), config).target == Target(90, 3)
    manifest = preprocess("folder", folder.files, config, out)
    assert (manifest.image_size, manifest.channels, manifest.report.unreadable) == (8, 1, 70)
    assert manifest.splits == expected.splits and manifest.mean == expected.mean


def test_a_file_that_is_too_large_is_not_read(folder: Folder, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.add_digits(range(120))
    film = out / "film"
    with film.open("wb") as file:
        file.truncate(300 * 2**20)  # bytes that no disk stores
    folder.files["1/film.png"] = film
    read: list[Path] = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or read_bytes(path))  # type: ignore[func-returns-value]
    report = preprocess("folder", folder.files, CONFIG, out).report
    assert [str(image) for image in report.unreadable_examples] == [
        "name='1/film.png' reason='314,572,800 bytes is more than 268,435,456'"
    ]
    assert len(read) == 240 and film not in read


def test_copies_are_counted_and_share_a_split(folder: Folder, out: Path) -> None:
    folder.add_digits(range(200))
    for path, local in list(folder.files.items())[:50]:
        folder.add(path.replace(".png", "-copy.png"), local.read_bytes())
    manifest = preprocess("folder", folder.files, CONFIG, out)
    assert manifest.report.duplicates == 50
    assert not any("training split too" in warning for warning in manifest.report.warnings)
    splits_of: dict[bytes, set[str]] = {}
    for split in manifest.splits:
        for image in unpack(out, manifest, split)[0]:
            splits_of.setdefault(image.tobytes(), set()).add(split)
    assert all(len(splits) == 1 for splits in splits_of.values())


def test_copies_side_by_side_may_be_shards_of_their_own(folder: Folder, out: Path) -> None:
    folder.add_digits(range(60))
    for path, local in list(folder.files.items()):
        folder.add(path.replace(".png", "-copy.png"), local.read_bytes())
    kept: list[bytes] = []

    def keep(packed: PackedShard, file: Path) -> None:
        kept.append(file.read_bytes())
        file.unlink()

    config = PreprocessConfig(shard_bytes=64, max_unreadable=0)
    plan = survey(open_source("folder", folder.files), config)
    manifest = pack(open_source("folder", folder.files), plan, config, out, on_shard=keep).manifest
    assert len(kept) == sum(len(split.shards) for split in manifest.splits.values()) == 120


def test_test_images_that_are_in_training_too_are_a_warning(folder: Folder, out: Path) -> None:
    folder.add_digits(range(200), "train/")
    folder.add_digits(range(190, 260), "test/")
    (warning,) = preprocess("folder", folder.files, CONFIG, out).report.warnings
    assert warning.split()[0].isdigit() and "are in the training split too" in warning


# --- shards and interruptions ---------------------------------------------------------------------


def test_shards_of_a_large_set_are_small_unless_said_otherwise(digits: dict[str, Path]) -> None:
    plan = survey(open_source("digits", digits), CONFIG)
    large = replace(plan, target=Target(4096, 3), splits=np.zeros(2000, dtype=np.int8))
    assert shard_bytes(plan, CONFIG) == 64 * 2**20
    assert shard_bytes(large, CONFIG) == 8 * 2**20
    assert shard_bytes(large, PreprocessConfig.model_validate({"shard_bytes": "16MiB"})) == 16 * 2**20
    with pytest.raises(ValueError, match="shard_bytes"):
        PreprocessConfig.model_validate({"shard_bytes": "16 parsecs"})


@pytest.mark.parametrize(("encoding", "shard_bytes"), [("raw", 2500), ("jpeg", 10_000)])  # a dozen shards
def test_going_on_after_any_shard_gives_the_same_manifest(
    folder: Folder, tmp_path: Path, encoding: str, shard_bytes: int
) -> None:
    folder.add_digits(range(400))
    for number in range(0, 400, 23):
        folder.add(f"{number % 10}/{number}-bad.png", b"no image at all")
    config = PreprocessConfig(max_unreadable=0.1, shard_bytes=shard_bytes, encoding=encoding)  # type: ignore[arg-type]
    source = open_source("folder", folder.files)
    plan = survey(source, config)

    def packed(name: str, done: list[PackedShard]) -> tuple[Manifest, list[PackedShard], int]:
        (tmp_path / name).mkdir()
        told: list[int] = []
        new: list[PackedShard] = []
        manifest, _ = pack(
            source, plan, config, tmp_path / name, told.append, done=done, on_shard=lambda each, _: new.append(each)
        )
        assert sum(told) == plan.count
        return manifest, [PackedShard.model_validate_json(each.model_dump_json()) for each in new], told[0]

    whole, shards, _ = packed("whole", [])
    assert whole.report.unreadable == 18 and len(shards) > 10
    for count in range(1, len(shards) + 1):
        manifest, others, skipped = packed(str(count), shards[:count])
        assert manifest.to_bytes() == whole.to_bytes()
        assert others == shards[count:]
        assert skipped >= sum(each.shard.count for each in shards[:count])


def test_going_on_after_any_part_of_the_survey_gives_the_same_plan(
    digits: dict[str, Path], folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cnn.preprocessing.survey.PART_IMAGES", 100)
    folder.add_digits(range(500))
    folder.add("3/bad.png", b"no image at all")
    for source in (open_source("folder", folder.files), open_source("digits", digits)):
        parts: list[SurveyPart] = []
        whole = survey(source, CONFIG, on_part=parts.append)
        assert parts[-1].stop == len(source)
        for count in range(len(parts) + 1):
            told: list[int] = []
            done = [SurveyPart.from_bytes(part.to_bytes()) for part in parts[:count]]
            plan = survey(source, CONFIG, told.append, done=done)
            assert (plan.labels == whole.labels).all() and (plan.splits == whole.splits).all()
            assert (plan.target, plan.headers, plan.duplicates) == (whole.target, whole.headers, whole.duplicates)
            assert sum(told) == len(source) and told[0] == (parts[count - 1].stop if count else 0)


def test_many_files_are_read_at_a_time(folder: Folder) -> None:
    """As many as `READER_THREADS` wait for a slow server side by side, whatever the number of cores."""
    folder.add_digits(range(1500))
    everybody = threading.Barrier(READER_THREADS)

    class Slow(LocalFiles):
        def read(self, position: int) -> bytes:
            if position % 32 == 0 and position < 32 * READER_THREADS:  # the first file of a block
                everybody.wait(20)
            return super().read(position)

    assert survey(open_source("folder", Slow(folder.files)), CONFIG).count == 1500


# --- the rest -------------------------------------------------------------------------------------


def test_progress_counts_every_image_twice(digits: dict[str, Path], out: Path) -> None:
    amounts: list[int] = []
    preprocess("digits", digits, CONFIG, out, amounts.append)
    assert sum(amounts) == 2 * 1797


def test_a_manifest_survives_its_bytes(digits: dict[str, Path], out: Path) -> None:
    manifest = preprocess("digits", digits, CONFIG, out)
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest
    assert manifest.version == hashlib.sha256(manifest.to_bytes()).hexdigest()
    with pytest.raises(InputError, match="not a dataset manifest"):
        Manifest.from_bytes(manifest.to_bytes()[:-1])
    with pytest.raises(InputError, match="classes"):
        Manifest.from_bytes(manifest.to_bytes().replace(b'"classes"', b'"klasses"'))


def test_few_items_are_taken_ahead_of_the_consumer() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for number in range(10_000):
            taken += 1
            yield number

    results = in_order(lambda number: number * 2, items())
    assert [next(results) for _ in range(10)] == list(range(0, 20, 2))
    assert taken < 10_000 / 2
    results.close()  # type: ignore[attr-defined]


def test_the_step_knows_every_module_it_depends_on() -> None:
    program = (
        "import sys, cnn.preprocessing.pack;"
        "print(*(module.__file__ for name, module in sys.modules.items() if name.split('.')[0] == 'cnn'))"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    names = {Path(file).resolve() for file in loaded.split()}
    package = Path(code_files()[-1]).parents[1]
    # Configuration enters the step's key by its values; errors and threads do not change what comes out.
    indifferent = {*package.glob("*.py"), *package.glob("config/*.py"), package / "data" / "__init__.py"}
    assert names - indifferent == {file.resolve() for file in code_files()}
