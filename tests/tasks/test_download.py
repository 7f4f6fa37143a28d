"""The whole download task, with a real bucket."""

from importlib.resources import files
from pathlib import Path
from typing import get_args

import pytest
from PIL import Image

from cnn import formats
from cnn.config.preprocessing import PreprocessConfig
from infra.errors import ServiceError, UsageError
from infra.sources import entries
from infra.sources.raw_data import RawSource
from infra.storage.object_store import ObjectStore
from tasks.data.download import download

pytestmark = pytest.mark.usefixtures("bucket")


def _download(dataset: str, *, refresh: bool = False, keep_raw: bool | None = None) -> RawSource:
    return download.fn(dataset, PreprocessConfig(keep_raw=keep_raw), refresh=refresh)


def _images(root: Path, *paths: str) -> Path:
    for number, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), number * 10).save(root / path)
    return root


def test_formats_that_are_downloaded_are_those_that_can_be_read() -> None:
    assert get_args(entries.Format) == get_args(formats.Format)


def test_a_catalogue_data_set_is_downloaded_once(store: ObjectStore) -> None:
    raw = _download("digits")
    assert (raw.name, raw.format, raw.reused) == ("digits", "digits", False)
    assert store.head(f"raw/{raw.files[0].sha256}") is not None
    again = _download("digits")
    assert again.reused and again.digest == raw.digest
    assert not _download("digits", refresh=True).reused


def test_of_a_folder_only_the_images_are_stored(store: ObjectStore, tmp_path: Path) -> None:
    paths = ("test/cat/1.bmp", "test/dog/1.webp", "train/cat/001.png", "train/dog/1.PNG")
    folder = _images(tmp_path / "pets", *paths)
    (folder / "train" / "cat" / "notes.txt").write_text("not an image")
    (folder / "README.md").write_text("not an image")
    raw = _download(str(folder))
    assert tuple(file.path for file in raw.files) == paths
    assert len(list(store.list("raw/"))) == 4
    assert _download(str(folder)).reused


def test_a_large_folder_is_read_in_place_unless_said_otherwise(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _images(tmp_path / "pets", "cat/1.png", "dog/1.png", "dog/2.png")
    (folder / "dog" / "notes.txt").write_text("not an image")
    assert _download(str(folder)).listing is None
    monkeypatch.setattr("infra.sources.folder.COPIED_FILES", 2)
    raw = _download(str(folder))
    assert raw.listing and raw.listing.count == 3 and not raw.reused
    assert _download(str(folder)).reused
    assert len(_download(str(folder), keep_raw=True).files) == 3
    monkeypatch.setattr("infra.sources.folder.COPIED_FILES", 50_000)
    assert _download(str(folder), keep_raw=False).listing == raw.listing


def test_what_has_to_be_fetched_cannot_be_left_where_it_is() -> None:
    with pytest.raises(UsageError, match=r"digits: data\.keep_raw=false is for folders"):
        _download("digits", keep_raw=False)


@pytest.mark.parametrize(
    ("paths", "folders", "words"),
    [
        ((), (), "image"),
        ((), ("cat", "dog"), "image"),
        (("cat/1.png", "dog/1.png"), ("bird",), "bird"),
        (("cat/1.png", "cat/2.png"), (), "only one class, cat"),
        (("1.png", "2.png"), (), "class folder"),
    ],
    ids=["empty folder", "empty classes", "one empty class", "one class", "no class folders"],
)
def test_a_folder_that_is_no_collection_of_classes_is_refused_before_anything_is_stored(
    store: ObjectStore, tmp_path: Path, paths: tuple[str, ...], folders: tuple[str, ...], words: str
) -> None:
    folder = _images(tmp_path / "set", *paths)
    for name in ("", *folders):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with pytest.raises(UsageError) as raised:
        _download(str(folder))
    message = str(raised.value)
    assert message.startswith(f"{folder}: ") and words in message and "\n" not in message
    assert raised.value.exit_status == 2
    assert list(store.list("")) == []


def test_an_unknown_data_set_is_the_users_mistake(store: ObjectStore) -> None:
    with pytest.raises(UsageError, match="did you mean digits"):
        _download("digit")
    assert list(store.list("")) == []


def test_the_users_mirror_is_taken_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVOY_MIRROR", str(tmp_path / "mirror"))
    assert _download("digits").served_by == {"digits.csv": "package:sklearn/datasets/data/digits.csv.gz"}
    (tmp_path / "mirror").mkdir()
    copy = tmp_path / "mirror" / "digits.csv.gz"
    copy.write_bytes((files("sklearn") / "datasets" / "data" / copy.name).read_bytes())
    assert _download("digits", refresh=True).served_by == {"digits.csv": f"file:{copy}"}
    copy.write_bytes(b"damaged")
    assert _download("digits", refresh=True).served_by["digits.csv"].startswith("package:")


def test_a_store_that_is_down_is_a_service_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(ServiceError, match="no connection") as raised:
        _download("digits")
    assert raised.value.exit_status == 1


def test_a_state_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CONVOY_HOME", str(tmp_path / "file"))
    with pytest.raises(ServiceError, match=r"file/cache.*Not a directory; CONVOY_HOME") as raised:
        _download("digits")
    assert "\n" not in str(raised.value)
