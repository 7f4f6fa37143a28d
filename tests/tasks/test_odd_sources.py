"""What people have on their disks, each as a folder, in a bucket, as a zip and as a tar: one content, one outcome."""

import io
import os
import random
import shutil
import tarfile
import unicodedata
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from cnn.config import PreprocessConfig
from cnn.errors import InputError
from cnn.manifest import Manifest
from infra.errors import UsageError
from infra.objectstore import ObjectStore
from tasks.dataset import DatasetRef, load_manifest
from tasks.download import download
from tasks.preprocess import preprocess

LEFT_OUT = "files not named like PNG, JPEG, WebP or BMP images were left out"
CAFE = unicodedata.normalize("NFC", "café")


def images(*folders: str, each: int = 6) -> dict[str, bytes]:
    """Small images, all different, and always the same ones."""
    contents = {}
    for folder in folders:
        for number in range(each):
            buffer = io.BytesIO()
            pixels = random.Random(f"{folder}/{number}").randbytes(64)
            Image.frombytes("L", (8, 8), pixels).save(buffer, "PNG")
            contents[f"{folder}/{number}.png"] = buffer.getvalue()
    return contents


def others(*paths: str) -> dict[str, bytes]:
    return dict.fromkeys(paths, b"no image")


CLEAN = images("cat", "dog", each=20)

# content -> classes, remarks; of images in splits also how many each split has
TABLE: dict[str, tuple[dict[str, bytes], tuple[str, ...], list[str], list[int] | None]] = {
    "clean": (CLEAN, ("cat", "dog"), [], None),
    "files in the root": (
        CLEAN | others("README.txt", "labels.csv", "desktop.ini", "Makefile", "cat_$folder$"),
        ("cat", "dog"),
        [f"5 {LEFT_OUT}, for example Makefile"],
        None,
    ),
    "other suffixes": (
        CLEAN | others(*(f"cat/p{n}.heic" for n in range(30)), *(f"dog/q{n}" for n in range(3))),
        ("cat", "dog"),
        [f"33 {LEFT_OUT} (cat 30, dog 3), for example cat/p0.heic"],
        None,
    ),
    "what other systems leave": (
        CLEAN | others("__MACOSX/cat/._1.png", "cat/Thumbs.db", ".DS_Store", "dog/.DS_Store"),
        ("cat", "dog"),
        [],
        None,
    ),
    "seg_train, seg_test, seg_pred": (
        images("seg_train/seg_train/sea", "seg_train/seg_train/wood", each=20)
        | images("seg_test/seg_test/sea", "seg_test/seg_test/wood", "seg_pred/seg_pred"),
        ("sea", "wood"),
        ["6 images in folders without labels were left out, for example seg_pred/seg_pred/0.png"],
        [34, 6, 12],
    ),
    "training_set, test_set, a file beside them": (
        images("training_set/cats", "training_set/dogs", each=20)
        | images("test_set/cats", "test_set/dogs")
        | others("README"),
        ("cats", "dogs"),
        [f"1 {LEFT_OUT}, for example README"],
        None,
    ),
    "train, dev, test, predict": (
        images("train/a", "train/b", "dev/a", "dev/b", "test/a", "test/b", "predict/x"),
        ("a", "b"),
        ["6 images in folders without labels were left out, for example predict/x/0.png"],
        [12, 12, 12],
    ),
    "train and unlabelled, wrapped": (
        images("set/train/a", "set/train/b", "set/unlabelled", each=20),
        ("a", "b"),
        ["20 images in folders without labels were left out, for example set/unlabelled/0.png"],
        None,
    ),
    "one name in two Unicode forms": (
        images(f"train/{unicodedata.normalize('NFD', CAFE)}", "train/thé", each=20)
        | images(f"val/{CAFE}", "val/thé", f"test/{CAFE}", "test/thé"),
        (CAFE, "thé"),
        [],
        [40, 12, 12],
    ),
    "a class called train": (images("train", "bus", "car", each=20), ("bus", "car", "train"), [], None),
    "names of images in other letters": (
        {f"{path[:-4]} 写真 é.png": content for path, content in CLEAN.items()},
        ("cat", "dog"),
        [],
        None,
    ),
}

REFUSED: dict[str, tuple[dict[str, bytes], str]] = {
    "train, test and one that is no split": (
        images("train/a", "train/b", "test/a", "test/b", "extra/x"),
        r"test and train hold folders of the same names \(a, b\): .* call them train, val, test",
    ),
    "other classes in each": (
        images("eval/a", "train/a", "train/b"),
        "eval and train may be splits: .* call them train",
    ),
    "no classes in them": (images("train", "test1"), "test1 and train may be splits: .* call them train, val, test"),
    "a train with classes beside a class": (images("train/a", "train/b", "x"), "train may be splits, but not x"),
    "a class without an image": (CLEAN | others("bird/1.heic", "bird/2.heic"), "bird holds no .* among its 2 files"),
    "no image at all": (others("cat/1.heic", "dog/1.tiff"), "no PNG, JPEG, WebP or BMP image found among 2 files"),
    "Git LFS pointers": (
        dict.fromkeys(CLEAN, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        r"not one of 40 images can be read \(cat/0.png: a Git LFS pointer .*; run git lfs pull\)",
    ),
}


@pytest.fixture(autouse=True)
def _own_bucket(store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVOY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CONVOY_BUCKET", store.bucket)


def laid_out(contents: dict[str, bytes], root: Path) -> Path:
    for path, content in contents.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return root


def forms(contents: dict[str, bytes], folder: Path, store: ObjectStore) -> Iterator[str]:
    """The content under the names by which a user would give it; archives hold it in no order."""
    yield str(laid_out(contents, folder / "d"))
    shuffled = list(contents.items())
    random.Random(1).shuffle(shuffled)
    with zipfile.ZipFile(folder / "d.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in shuffled:
            archive.writestr(path, content)
    yield str(folder / "d.zip")
    with tarfile.open(folder / "d.tar.gz", "w:gz") as archive:
        for path, content in shuffled:
            info = tarfile.TarInfo(path)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    yield str(folder / "d.tar.gz")
    for path, content in contents.items():
        store.put_bytes(f"in/d/{path}", content)
    yield f"s3://{store.bucket}/in/d"


def prepared(dataset: str, *, keep_raw: bool | None = None) -> DatasetRef:
    return preprocess.fn(download.fn(dataset, keep_raw=keep_raw), PreprocessConfig())


def packed(dataset: str, store: ObjectStore, *, keep_raw: bool | None = None) -> Manifest:
    return load_manifest(store, prepared(dataset, keep_raw=keep_raw).version)


@pytest.mark.parametrize("row", TABLE)
def test_one_content_gives_one_dataset_version(row: str, tmp_path: Path, store: ObjectStore) -> None:
    contents, classes, remarks, counts = TABLE[row]
    found = {dataset: packed(dataset, store) for dataset in forms(contents, tmp_path, store)}
    found["in place"] = packed(str(tmp_path / "d"), store, keep_raw=False)
    first = found[str(tmp_path / "d")]
    assert first.classes == classes
    assert list(first.report.warnings) == remarks
    assert counts is None or [split.count for split in first.splits.values()] == counts
    assert {dataset: manifest.version for dataset, manifest in found.items()} == dict.fromkeys(found, first.version)


@pytest.mark.parametrize("row", REFUSED)
def test_one_content_is_refused_in_the_same_words(row: str, tmp_path: Path, store: ObjectStore) -> None:
    contents, words = REFUSED[row]
    for dataset in forms(contents, tmp_path, store):
        with pytest.raises((UsageError, InputError), match=words) as raised:
            prepared(dataset)
        assert "\n" not in str(raised.value)


def test_what_was_left_out_of_each_class_is_in_the_report(tmp_path: Path, store: ObjectStore) -> None:
    root = laid_out(TABLE["other suffixes"][0], tmp_path / "d")
    for number in range(60):
        (root / "dog" / f"link{number:02}.png").symlink_to("/nowhere")
    report = packed(str(root), store).report
    assert report.warnings == (
        f"33 {LEFT_OUT} (cat 30, dog 3), for example cat/p0.heic",
        "60 entries that are no readable files (broken links, say) were left out (dog 60), for example dog/link00.png",
    )
    assert {name: (lost.images, lost.left_out) for name, lost in report.left_out.items()} == {
        "cat": (20, 30),
        "dog": (20, 63),
    }
    again = download.fn(str(root))
    assert again.reused and again.remarks == report.warnings
    shutil.rmtree(root / "dog")
    for path in CLEAN:
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).unlink(missing_ok=True)
        (root / path).symlink_to("/nowhere")
    for path in root.glob("*/*.heic"):
        path.unlink()
    with pytest.raises(UsageError, match=r"among 0 files and 40 broken links, for example cat/0\.png; fetch"):
        download.fn(str(root))


def test_a_clean_source_keeps_the_version_that_it_always_had(tmp_path: Path, store: ObjectStore) -> None:
    content = packed(str(laid_out(CLEAN, tmp_path / "d")), store).to_bytes()
    assert b"left_out" not in content and b'"warnings":[]' in content


def test_names_of_a_bucket_that_no_folder_could_have(store: ObjectStore) -> None:
    for path, content in CLEAN.items():
        store.put_bytes(f"in/d/{path}", content)
    store.put_bytes("in/d/", b"")
    store.put_bytes("in/d/cat/", b"")
    store.put_bytes("in/d//cat/7.png", b"unreachable in a folder")
    raw = download.fn(f"s3://{store.bucket}/in/d")
    (remark,) = raw.remarks
    assert remark.startswith("1 entries that are no readable files") and "(cat 1)" in remark
    assert len(raw.files) == 40
    store.put_bytes("in/d/bird/", b"")
    with pytest.raises(UsageError, match="class folder bird holds no"):
        download.fn(f"s3://{store.bucket}/in/d")


def test_an_address_of_a_file_is_decoded(tmp_path: Path) -> None:
    laid_out(CLEAN, tmp_path / "my photos")
    assert len(download.fn(f"file://{tmp_path}/my%20photos").files) == 40
    assert len(download.fn(f"file://localhost{tmp_path}/my%20photos").files) == 40
    os.rename(tmp_path / "my photos", tmp_path / "my%20photos")
    assert len(download.fn(f"file://{tmp_path}/my%20photos").files) == 40
