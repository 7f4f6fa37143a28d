"""Label tables as sources, the image index of a dataset version, groups, and the changes between two versions."""

import csv
import random
import shutil
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from cnn.config.preprocessing import ColumnsConfig, PreprocessConfig
from cnn.data.splits import SPLITS
from cnn.errors import InputError
from infra.errors import Outage, ServiceError, UsageError
from infra.storage import bucket_layout
from infra.storage.object_store import ObjectStore
from tasks.data import dataset_diff
from tasks.data.dataset import DatasetRef, load_manifest
from tasks.data.dataset_diff import COLUMNS, differences, summary
from tasks.data.download import download
from tasks.data.image_index import ImageIndex, load_index, read_index_record, slice_masks
from tasks.data.preprocess import preprocess
from tests.tasks.test_odd_sources import forms, images, laid_out

CONFIG = PreprocessConfig(val_fraction=0.3, test_fraction=0.3)
PHOTOS = images("cat", "dog", each=20)


def packed(dataset: object, config: PreprocessConfig = CONFIG, *, refresh: bool = False) -> DatasetRef:
    return preprocess.fn(download.fn(str(dataset), config), config, refresh=refresh)


def index_of(store: ObjectStore, dataset: DatasetRef) -> ImageIndex:
    index = load_index(store, dataset.version)
    assert index
    return index


def rows(index: ImageIndex) -> dict[str, dict[str, object]]:
    return {row["path"]: row for row in index.table.to_pylist()}


def table(file: Path, lines: list[dict[str, str]]) -> Path:
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    return file


def photos_table(file: Path, **columns: str) -> Path:
    """A table beside the photographs, without metadata but for constant columns."""
    return table(file, [{"path": path, "label": path.split("/")[0], **columns} for path in PHOTOS])


@pytest.mark.long
def test_a_table_and_every_form_of_its_folder_are_one_version_with_one_index(
    tmp_path: Path, bucket: ObjectStore
) -> None:
    folder, *archives = forms(PHOTOS, tmp_path)
    beside = photos_table(folder / "labels.csv")
    absolute = table(
        tmp_path / "elsewhere.csv",
        [{"label": path.split("/")[0], "path": f"{folder}/{path}"} for path in reversed(PHOTOS)],
    )
    for path, content in PHOTOS.items():
        bucket.put_bytes(f"in/d/{path}", content)
    bucket.put_file("in/d/labels.csv", beside)
    inside = f"s3://{bucket.bucket}/in/d"
    named = table(
        tmp_path / "named.jsonl", [{"path": f"{inside}/{path}", "label": path.split("/")[0]} for path in PHOTOS]
    )
    named.write_text("\n".join(f'{{"path": "{inside}/{path}", "label": "{path.split("/")[0]}"}}' for path in PHOTOS))
    beside.rename(tmp_path / "kept.csv")  # or the folder's report would name it
    wrapped = laid_out({f"photos/{path}": content for path, content in PHOTOS.items()}, tmp_path / "wrapped")
    plain = packed(folder)
    found = [packed(each) for each in (*archives, wrapped)]
    paths = rows(index_of(bucket, plain))
    assert paths.keys() == PHOTOS.keys()
    for each in found:
        assert each.version == plain.version and rows(index_of(bucket, each)) == paths
    (tmp_path / "kept.csv").rename(beside)
    for dataset in (beside, absolute, named, f"{inside}/labels.csv"):
        for keep_raw in (True, False):
            ref = packed(dataset, CONFIG.model_copy(update={"keep_raw": keep_raw}), refresh=True)
            assert ref.version == plain.version, (dataset, keep_raw)
            images_of = [
                {**row, "path": row["path"].removeprefix(f"{folder}/").removeprefix(f"{inside}/")}  # type: ignore[attr-defined]
                for row in rows(index_of(bucket, ref)).values()
            ]
            assert images_of == list(paths.values()), dataset


def test_the_index_says_which_packed_image_each_file_is(tmp_path: Path, bucket: ObjectStore) -> None:
    folder = laid_out({**PHOTOS, "cat/broken.png": b"no image"}, tmp_path / "d")
    config = CONFIG.model_copy(update={"max_unreadable": 0.5, "limit": 10})
    dataset = packed(folder, config)
    manifest, index = load_manifest(bucket, dataset.version), index_of(bucket, dataset)
    assert index.table.num_rows == sum(split.count for split in manifest.splits.values())
    for split in SPLITS:
        part = index.of_split(split)
        assert part["position"].to_pylist() == list(range(manifest.splits[split].count))
        assert part["label"].to_pylist() == [path.split("/")[0] for path in part["path"].to_pylist()]
        by_class = Counter(part["label"].to_pylist())
        assert tuple(by_class[name] for name in manifest.classes) == manifest.splits[split].class_counts
    from cnn.formats.decode import Target, decode_image
    from infra.settings import Settings
    from infra.storage.cache import Cache
    from tasks.data.dataset import open_split

    pixels, _ = open_split(Cache(Settings().cache, bucket), manifest, "test").slice(0, 10)
    for path, image in zip(index.paths("test"), pixels, strict=False):
        assert path and (image.numpy() == decode_image(PHOTOS[path], Target(manifest.image_size, 1))).all()
    assert "cat/broken.png" not in rows(index)


def test_images_without_files_have_an_index_too(bucket: ObjectStore) -> None:
    index = index_of(bucket, packed("digits"))
    assert index.table.num_rows == 1797 and set(index.table["path"].to_pylist()) == {None}
    assert len(set(index.table["digest"].to_pylist())) > 1700


def test_another_value_in_a_column_makes_no_new_version(tmp_path: Path, bucket: ObjectStore) -> None:
    folder = laid_out(PHOTOS, tmp_path / "d")
    before = packed(photos_table(folder / "labels.csv", camera="left"))
    assert set(rows(index_of(bucket, before))["cat/1.png"].items()) >= {("meta.camera", "left"), ("label", "cat")}
    stored = {info.key for info in bucket.list(bucket_layout.SHARDS)}
    after = packed(photos_table(folder / "labels.csv", camera="right", site="x"))
    assert after.reused and after.version == before.version
    index = index_of(bucket, after)
    assert index.columns == ("camera", "site")
    assert set(index.table["meta.camera"].to_pylist()) == {"right"}
    assert {info.key for info in bucket.list(bucket_layout.SHARDS)} == stored
    assert slice_masks(index, "test", ["site", "nothing"]).keys() == {"site=x"}


@pytest.mark.long
def test_an_index_of_another_source_of_the_same_images_is_made_again(tmp_path: Path, bucket: ObjectStore) -> None:
    folder = laid_out(PHOTOS, tmp_path / "d")
    absolute = [{"path": f"{folder}/{path}", "label": path.split("/")[0], "camera": "left"} for path in PHOTOS]
    elsewhere = table(tmp_path / "labels.csv", absolute)
    first, plain, again, reused = (packed(each) for each in (elsewhere, folder, elsewhere, elsewhere))
    assert first.version == plain.version == again.version == reused.version
    assert (again.reused, reused.reused) == (False, True)
    found = rows(index_of(bucket, reused))
    assert found.keys() == {row["path"] for row in absolute}
    assert {row["meta.camera"] for row in found.values()} == {"left"}


def test_columns_called_like_those_of_the_index_are_told_apart_in_csv(tmp_path: Path, bucket: ObjectStore) -> None:
    folder = laid_out(PHOTOS, tmp_path / "d")
    mine = {"digest": "mine", "camera": "left", "row": "7"}
    lines = [{"path": path, "label": path.split("/")[0], "group": path, **mine} for path in PHOTOS]
    index_of(bucket, packed(table(folder / "labels.csv", lines))).write_csv(tmp_path / "out.csv")
    assert (tmp_path / "out.csv").stat().st_mode == (folder / "labels.csv").stat().st_mode
    with (tmp_path / "out.csv").open(newline="") as stream:
        found = list(csv.DictReader(stream))
    own = ["split", "position", "label", "digest", "path", "group"]
    assert list(found[0]) == [*own, "meta.digest", "camera", "row"]
    assert {each["meta.digest"] for each in found} == {"mine"} and len(found) == len(PHOTOS)


def test_a_lost_index_is_named_with_its_remedy(tmp_path: Path, bucket: ObjectStore) -> None:
    folder = laid_out(PHOTOS, tmp_path / "d")
    labels = photos_table(folder / "labels.csv", camera="left")
    dataset = packed(labels)
    record = read_index_record(bucket, dataset.version)
    assert record
    bucket.put_bytes(bucket_layout.image_index(dataset.version, record.sha256), b"damaged")
    with pytest.raises(ServiceError, match="if it is lost, --refresh preprocess writes it again"):
        load_index(bucket, dataset.version)
    assert packed(labels, refresh=True).version == dataset.version
    assert index_of(bucket, dataset).columns == ("camera",)


def test_an_outage_is_no_damage_of_the_index(bucket: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = packed("digits")

    def away(*_: object, **__: object) -> None:
        raise Outage("the store is away")

    monkeypatch.setattr(ObjectStore, "get_file", away)
    with pytest.raises(Outage, match=r"^the store is away$"):
        load_index(bucket, dataset.version)


def test_a_table_beside_class_folders_adds_its_columns(tmp_path: Path, bucket: ObjectStore) -> None:
    plain = packed(laid_out(PHOTOS, tmp_path / "plain"))
    folder = laid_out(PHOTOS, tmp_path / "d")
    lines = [{"path": path, "camera": path[-5]} for path in PHOTOS if path != "cat/3.png"]
    table(folder / "metadata.csv", [*lines, {"path": "cat/none.png", "camera": "?"}])
    dataset = packed(folder)
    assert dataset.version == plain.version and dataset.name == "d"
    found = rows(index_of(bucket, dataset))
    assert (found["cat/4.png"]["meta.camera"], found["cat/3.png"]["meta.camera"]) == ("4", None)
    table(folder / "metadata.csv", [{"path": path, "label": "cat", "camera": "x"} for path in PHOTOS])
    with pytest.raises(UsageError, match=r"metadata\.csv: row 22 has the label 'cat', but .* class folder dog"):
        packed(folder)
    table(folder / "metadata.csv", [{"path": f"d/{path}", "camera": "x"} for path in PHOTOS])
    with pytest.raises(UsageError, match=r"metadata\.csv names none of the images"):
        packed(folder)
    (folder / "metadata.csv").write_text("filename,camera,group\ncat/3.png,x,1\n")  # which must not be lost
    with pytest.raises(UsageError, match=r"metadata\.csv has no column 'path': its columns are filename, camera"):
        packed(folder)
    (folder / "metadata.csv").write_text("some,other\ntable,1\n")
    dataset = packed(folder)
    assert index_of(bucket, dataset).columns == ()
    assert "metadata.csv" in load_manifest(bucket, dataset.version).report.warnings[0]


@pytest.mark.long
def test_a_group_stays_in_one_split_whatever_else_comes(tmp_path: Path, bucket: ObjectStore) -> None:
    folder = laid_out(images("cat", "dog", each=60), tmp_path / "d")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    lines = [{"path": path, "label": path.split("/")[0], "patient": f"p{int(path[4:-4]) // 3}"} for path in names]
    config = CONFIG.model_copy(update={"group": "patient"})
    whole = index_of(bucket, packed(table(folder / "labels.csv", lines), config))
    splits = {group: set() for group in whole.table["group"].to_pylist()}
    for row in whole.table.to_pylist():
        splits[row["group"]].add(row["split"])
    assert len(splits) == 20 and all(len(each) == 1 for each in splits.values())
    assert {split for each in splits.values() for split in each} == set(SPLITS)
    fewer = index_of(bucket, packed(table(folder / "labels.csv", lines[::2]), config))
    for row in fewer.table.to_pylist():
        assert splits[row["group"]] == {row["split"]}
    by_column = ColumnsConfig(group="patient")
    again = packed(table(folder / "labels.csv", lines), CONFIG.model_copy(update={"columns": by_column}))
    assert rows(index_of(bucket, again)) == rows(whole)
    ungrouped = index_of(bucket, packed(folder / "labels.csv"))
    assert rows(ungrouped) != rows(whole) and set(ungrouped.table["group"].to_pylist()) == {None}


def test_groups_come_and_go_with_the_table_though_the_images_are_the_same(tmp_path: Path, bucket: ObjectStore) -> None:
    """Explicit splits: the groups decide nothing about them, so that the version stays."""
    folder = tmp_path / "d"
    for split in SPLITS:
        laid_out(images("cat", "dog", each=4), folder / split)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    lines = [{"path": path, "label": path.split("/")[1], "patient": path[-5], "light": "dim"} for path in names]
    config = CONFIG.model_copy(update={"columns": ColumnsConfig(group="patient")})
    without = packed(folder, config)
    table(folder / "metadata.csv", lines)
    with_groups = packed(folder, config)
    found = index_of(bucket, with_groups)
    assert with_groups.version == without.version
    assert set(found.table["group"].to_pylist()) > {"0", "1"} and found.columns == ("patient", "light")
    (folder / "metadata.csv").unlink()
    found = index_of(bucket, packed(folder, config))
    assert set(found.table["group"].to_pylist()) == {None} and found.columns == ()
    table(folder / "metadata.csv", lines)
    again = packed(folder, config)
    assert again.reused and set(index_of(bucket, again).table["group"].to_pylist()) > {"0", "1"}


def test_splits_of_a_table_are_kept(tmp_path: Path, bucket: ObjectStore) -> None:
    folder = laid_out(PHOTOS, tmp_path / "d")
    split_of = ["Train", "valid", "testing", ""]
    lines = [
        {"path": path, "label": path.split("/")[0], "split": split_of[number % 4]} for number, path in enumerate(PHOTOS)
    ]
    found = rows(index_of(bucket, packed(table(folder / "labels.csv", lines))))
    expected = ["train", "val", "test", "train"]  # without a word, an image is for training if there are official tests
    assert [found[path]["split"] for path in PHOTOS] == [expected[number % 4] for number in range(len(PHOTOS))]


@pytest.mark.parametrize(
    ("lost", "limit", "words"),
    [
        (1, 0.0, r"labels\.csv: 1 of its 40 files cannot be read, and data\.max_unreadable is 0: cat/0\.png \(row 2\)"),
        (5, 0.1, r"5 of its 40 files .* is 0\.1: cat/0\.png \(row 2\), cat/1\.png \(row 3\), cat/10\.png \(row 12\)"),
        (40, 1.0, r"40 of its 40 files cannot be read"),
        (1, 0.1, ""),
    ],
)
def test_missing_files_count_as_unreadable(
    lost: int, limit: float, words: str, tmp_path: Path, bucket: ObjectStore
) -> None:
    folder = laid_out(PHOTOS, tmp_path / "d")
    labels = photos_table(folder / "labels.csv")
    for path in sorted(PHOTOS)[:lost]:
        (folder / path).unlink()
    config = CONFIG.model_copy(update={"max_unreadable": limit})
    if words:
        with pytest.raises(UsageError, match=words):
            packed(labels, config)
        return
    version = packed(labels, config).version
    head, *rows = labels.read_text().splitlines()
    labels.write_text("\n".join([head, *reversed(rows)]))
    assert packed(labels, config).version == version
    report = load_manifest(bucket, version).report
    assert report.warnings == ("1 row of the label table left out, without a file: cat/0.png",)
    assert {name: (lost.images, lost.left_out) for name, lost in report.left_out.items()} == {"cat": (19, 1)}


@pytest.mark.parametrize(
    ("config", "dataset", "words"),
    [
        ({"slices": ("site",)}, "labels.csv", "data.slices names the column 'site', which .* its columns are camera"),
        ({"group": "patient"}, "labels.csv", "no column 'patient'"),
        (
            {"group": "patient"},
            ".",
            "data.group names the column 'patient', which .* it has none: they come",
        ),
        ({"slices": ("site",)}, "digits", "data.slices names the column 'site', which digits lacks"),
        (
            {"slices": ("note",)},
            "labels.csv",
            "column 'note', which has a value of 256 characters",
        ),
        (
            {"group": "camera"},
            "labels.csv",
            "images of one group stay together; number of groups: 1",
        ),
    ],
)
def test_a_column_that_is_missing_is_named(
    config: dict[str, object], dataset: str, words: str, tmp_path: Path, bucket: ObjectStore
) -> None:
    folder = laid_out(PHOTOS, tmp_path / "d")
    photos_table(folder / "labels.csv", camera="x", note=256 * "x")
    with pytest.raises((UsageError, InputError), match=words):
        packed(dataset if dataset == "digits" else folder / dataset, CONFIG.model_copy(update=config))


def test_a_table_with_one_label_is_refused(tmp_path: Path, bucket: ObjectStore) -> None:
    folder = laid_out(PHOTOS, tmp_path / "d")
    with pytest.raises(UsageError, match="all 40 rows have the label 'x'; a classifier needs two classes"):
        packed(table(folder / "labels.csv", [{"path": path, "label": "x"} for path in PHOTOS]))


@pytest.mark.long
def test_what_changed_between_two_versions_is_named_by_file(tmp_path: Path, bucket: ObjectStore) -> None:
    folder = laid_out(PHOTOS, tmp_path / "d")
    before = index_of(bucket, packed(folder))
    assert differences(before, before) == [] and summary([]) == "no change"
    split_of = {row["path"]: row["split"] for row in before.table.to_pylist()}
    same_split = [path for path in PHOTOS if path.startswith("cat/") and split_of[path] == "train"]
    relabelled, renamed, removed = same_split[:3]
    shutil.move(folder / relabelled, folder / "dog" / "was-a-cat.png")
    shutil.move(folder / renamed, folder / "cat" / "new-name.png")
    (folder / removed).unlink()
    for path, content in images("bird").items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(content)
    other = images("fish", each=1)["fish/0.png"]
    (folder / "dog/5.png").write_bytes(other)
    after = index_of(bucket, packed(folder))
    changes = differences(before, after)
    found = {(change.kind, change.path): (change.earlier, change.later) for change in changes if change.kind != "moved"}
    assert found == {
        **{("added", path): ("", "bird") for path in images("bird")},
        ("removed", removed): ("cat", ""),
        ("renamed", "cat/new-name.png"): (renamed, "cat/new-name.png"),
        ("renamed", "dog/was-a-cat.png"): (relabelled, "dog/was-a-cat.png"),
        ("relabelled", "dog/was-a-cat.png"): ("cat", "dog"),
        ("changed", "dog/5.png"): (
            pc.filter(before.table["digest"], pc.equal(before.table["path"], "dog/5.png"))[0].as_py(),
            pc.filter(after.table["digest"], pc.equal(after.table["path"], "dog/5.png"))[0].as_py(),
        ),
    }
    now = {row["path"]: row["split"] for row in after.table.to_pylist()}
    assert {change.path for change in changes if change.kind == "moved"} == (
        {"dog/5.png"} if now["dog/5.png"] != split_of["dog/5.png"] else set()
    )
    assert summary(changes).startswith("6 added, 1 removed, 2 renamed, with the same content, 1 with other content")


def test_equal_images_without_files_are_told_apart(bucket: ObjectStore) -> None:
    few = index_of(bucket, packed("digits", PreprocessConfig(limit=100)))
    whole = index_of(bucket, packed("digits", PreprocessConfig()))
    kinds = Counter(change.kind for change in differences(few, whole))
    assert kinds == {"added": 1797 - few.table.num_rows}


def test_images_that_are_equal_in_both_versions_change_nothing_about_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are left out early, since versions may have millions of them; some images have no path."""
    chance = random.Random(11)

    def index() -> ImageIndex:
        rows = [
            {
                "path": chance.choice([f"{path}.png", f"{path}.png", None]),
                "digest": chance.choice("01234"),
                "label": chance.choice(["cat", "dog"]),
                "split": chance.choice(["train", "test"]),
            }
            for path in chance.sample(range(14), chance.randrange(1, 13))
        ]
        schema = pa.schema([(name, pa.large_string() if name == "path" else pa.string()) for name in COLUMNS])
        return ImageIndex(pa.Table.from_pylist(rows, schema))

    pairs = [(index(), index()) for _ in range(100)]
    found = [differences(*pair) for pair in pairs]
    monkeypatch.setattr(dataset_diff, "_without_equal_rows", lambda *tables: tables)
    assert found == [differences(*pair) for pair in pairs]
    assert sum(map(len, found)) > 500
