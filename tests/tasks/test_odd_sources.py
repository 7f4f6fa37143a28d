"""Unusual contents of folders, each as a folder, in a bucket, as a zip and as a tar: the outcome is the same."""

import io
import random
import tarfile
import unicodedata
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from cnn.config.preprocessing import PreprocessConfig
from cnn.data.manifest import Manifest
from cnn.data.splits import Split
from cnn.errors import InputError
from cnn.formats import open_source
from cnn.formats.layout import LeftOut
from cnn.preprocessing.pack import pack
from cnn.preprocessing.survey import survey
from infra.errors import UsageError
from infra.sources.find import find_source
from infra.sources.folder import FolderSource, local_folder
from infra.sources.location import ListedFiles
from infra.sources.mirrors import Mirrors
from infra.storage.object_store import ObjectStore
from tasks.data.dataset import load_manifest
from tasks.data.download import download
from tasks.data.label_tables import images_of
from tasks.data.preprocess import preprocess

CONFIG = PreprocessConfig(val_fraction=0.3, test_fraction=0.3)  # or a few images leave a split without a class

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
TABLE: dict[str, tuple[dict[str, bytes], tuple[str, ...], list[str], dict[Split, int] | None]] = {
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
    "seg_train, seg_test, seg_pred, a file beside them": (
        images("seg_train/seg_train/sea", "seg_train/seg_train/wood", each=8)
        | images("seg_test/seg_test/sea", "seg_test/seg_test/wood", "seg_pred/seg_pred", each=2)
        | others("README", "seg_train/seg_train/sea/1.heic"),
        ("sea", "wood"),
        [
            f"2 {LEFT_OUT} (sea 1), for example README",
            "2 images in folders without labels were left out, for example seg_pred/seg_pred/0.png",
        ],
        {"test": 4},
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
        {"train": 12, "val": 12, "test": 12},
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
        {"train": 40, "val": 12, "test": 12},
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
        r"test and train contain folders with the same names \(a, b\): .* call them train, val, test",
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


def laid_out(contents: dict[str, bytes], root: Path) -> Path:
    for path, content in contents.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return root


def forms(contents: dict[str, bytes], folder: Path) -> list[Path]:
    """Writes the content as a folder, a zip and a tar; the order in archives is arbitrary."""
    shuffled = list(contents.items())
    random.Random(1).shuffle(shuffled)
    with zipfile.ZipFile(folder / "d.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in shuffled:
            archive.writestr(path, content)
    with tarfile.open(folder / "d.tar.gz", "w:gz") as archive:
        for path, content in shuffled:
            info = tarfile.TarInfo(path)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return [laid_out(contents, folder / "d"), folder / "d.zip", folder / "d.tar.gz"]


def packed(dataset: Path, out: Path) -> Manifest:
    """Returns the result of the two tasks, which use no server here."""
    if dataset.is_dir():
        folder = images_of(local_folder(dataset), str(dataset))
        left_out = LeftOut(folder.remarks, folder.left_out)
        source = open_source("folder", ListedFiles(folder.files, folder.location), left_out=left_out)
    else:
        source = open_source("archive", {dataset.name: dataset})
    out.mkdir(exist_ok=True)
    return pack(source, survey(source, CONFIG), CONFIG, out).manifest


def stored(dataset: str, store: ObjectStore, *, keep_raw: bool | None = None) -> Manifest:
    """Returns the result of the two tasks."""
    ref = preprocess.fn(download.fn(dataset, PreprocessConfig(keep_raw=keep_raw)), CONFIG)
    return load_manifest(store, ref.version)


def check(manifest: Manifest, row: str) -> None:
    _, classes, remarks, counts = TABLE[row]
    assert manifest.classes == classes
    assert list(manifest.report.warnings) == remarks
    assert {split: manifest.splits[split].count for split in counts or ()} == (counts or {})


@pytest.mark.parametrize("row", TABLE)
def test_one_content_gives_one_dataset_version(row: str, tmp_path: Path) -> None:
    found = [packed(dataset, tmp_path / "out") for dataset in forms(TABLE[row][0], tmp_path)]
    check(found[0], row)
    assert {manifest.version for manifest in found} == {found[0].version}


@pytest.mark.parametrize("row", REFUSED)
def test_one_content_is_refused_in_the_same_words(row: str, tmp_path: Path) -> None:
    contents, words = REFUSED[row]
    for dataset in forms(contents, tmp_path):
        with pytest.raises((UsageError, InputError), match=words):
            packed(dataset, tmp_path / "out")


@pytest.mark.long
@pytest.mark.parametrize("row", ["seg_train, seg_test, seg_pred, a file beside them"])
def test_it_does_so_through_the_tasks_and_from_a_bucket(row: str, tmp_path: Path, bucket: ObjectStore) -> None:
    for path, content in TABLE[row][0].items():
        bucket.put_bytes(f"in/d/{path}", content)
    whole, address = forms(TABLE[row][0], tmp_path), f"s3://{bucket.bucket}/in/d"
    found = [stored(str(dataset), bucket) for dataset in (*whole, address)]
    found += [stored(dataset, bucket, keep_raw=False) for dataset in (str(whole[0]), address)]
    check(found[0], row)
    assert {manifest.version for manifest in found} == {packed(whole[0], tmp_path / "out").version}


def test_what_was_left_out_of_each_class_is_in_the_report(tmp_path: Path) -> None:
    root = laid_out(TABLE["other suffixes"][0], tmp_path / "d")
    for number in range(60):
        (root / "dog" / f"link{number:02}.png").symlink_to("/nowhere")
    report = packed(root, tmp_path / "out").report
    assert report.warnings == (
        f"33 {LEFT_OUT} (cat 30, dog 3), for example cat/p0.heic",
        "60 entries that are no readable files (broken links, say) were left out (dog 60), for example dog/link00.png",
    )
    assert {name: (lost.images, lost.left_out) for name, lost in report.left_out.items()} == {
        "cat": (20, 30),
        "dog": (20, 63),
    }


def test_a_folder_of_links_that_lead_nowhere_is_named_as_that(tmp_path: Path) -> None:
    for path in CLEAN:
        (tmp_path / "d" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / path).symlink_to("/nowhere")
    with pytest.raises(UsageError, match=r"among 0 files and 40 broken links, for example cat/0\.png; fetch"):
        packed(tmp_path / "d", tmp_path / "out")


def test_a_clean_source_keeps_the_version_that_it_always_had(tmp_path: Path) -> None:
    manifest = packed(laid_out(CLEAN, tmp_path / "d"), tmp_path / "out")
    assert b"left_out" not in manifest.to_bytes() and manifest.report.warnings == ()


def test_a_new_file_that_is_no_image_is_noticed(tmp_path: Path, bucket: ObjectStore) -> None:
    for path, content in images("cat", "dog", each=2).items():
        bucket.put_bytes(f"in/d/{path}", content)
    bucket.put_bytes("in/d/", b"")
    bucket.put_bytes("in/d/cat/", b"")  # this key represents a folder
    address = f"s3://{bucket.bucket}/in/d"
    before = download.fn(address)
    assert before.remarks == () and download.fn(address).reused
    bucket.put_bytes("in/d/cat/p.heic", b"")
    after = download.fn(address)
    assert after.files == before.files and after.digest != before.digest
    assert after.remarks == (f"1 {LEFT_OUT} (cat 1), for example cat/p.heic",) == download.fn(address).remarks
    in_place = [download.fn(address, PreprocessConfig(keep_raw=False)) for _ in range(2)]
    assert in_place[0].remarks == in_place[1].remarks == after.remarks and in_place[1].reused
    bucket.put_bytes("in/d/bird/", b"")
    with pytest.raises(UsageError, match="class folder bird holds no"):
        download.fn(address)


@pytest.mark.parametrize("address", ["file://{}/my%20photos", "file://localhost{}/my%20photos", "file:{}/my photos"])
def test_an_address_of_a_file_is_decoded(address: str, tmp_path: Path) -> None:
    laid_out(CLEAN, tmp_path / "my photos")
    with Mirrors(tmp_path / "partial") as mirrors:
        source = find_source(address.format(tmp_path), mirrors)
        assert isinstance(source, FolderSource) and len(source.files) == 40
        (tmp_path / "my photos").rename(tmp_path / "my%20photos")
        if "%20" in address:
            assert isinstance(find_source(address.format(tmp_path), mirrors), FolderSource)
