"""`convoy data show`, `data diff` and `data check`, on two versions of a label table's images."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from cnn.config.preprocessing import PreprocessConfig
from infra.settings import Settings
from tasks.data.download import download
from tasks.data.preprocess import preprocess
from tests.flows.conftest import Convoy
from tests.tasks.test_odd_sources import images, laid_out

PHOTOS = images("cat", "dog", each=20)
CONFIG = PreprocessConfig(val_fraction=0.3, test_fraction=0.3)


@dataclass(frozen=True)
class Versions:
    before: str
    after: str


def table(file: Path, labels: dict[str, str]) -> Path:
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["path", "label", "camera"])
        writer.writerows(
            [path, label, "left" if number % 4 else ""] for number, (path, label) in enumerate(labels.items())
        )
    return file


@pytest.fixture(scope="module")
def versions(stack: object, tmp_path_factory: pytest.TempPathFactory) -> Versions:
    folder = laid_out(PHOTOS, tmp_path_factory.mktemp("photos"))
    labels = {path: path.split("/")[0] for path in PHOTOS}
    before = preprocess.fn(download.fn(str(table(folder / "one.csv", labels))), CONFIG)
    labels["cat/3.png"] = "dog"
    del labels["dog/5.png"]
    after = preprocess.fn(download.fn(str(table(folder / "two.csv", labels))), CONFIG)
    return Versions(before.version, after.version)


def test_a_version_is_shown_and_its_images_are_written(convoy: Convoy, versions: Versions, tmp_path: Path) -> None:
    done = convoy("data", "show", versions.before[:8], "--out", str(tmp_path / "images.csv"))
    assert done.status == 0, done.stderr
    words = " ".join(done.stdout.split())
    assert "class train val test cat " in words and f"version {versions.before} images train " in words
    assert "column camera left 30, (none) 10" in words and "40 images in " in words
    with (tmp_path / "images.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["path"]: row["label"] for row in rows} == {path: path.split("/")[0] for path in PHOTOS}
    described = json.loads(convoy("data", "show", versions.before, "--json").stdout)
    assert described["columns"] == {"camera": {"left": 30, "(none)": 10}}
    assert sum(described["splits"].values()) == 40
    assert set(rows[0]) == {"split", "position", "label", "digest", "path", "group", "camera"}


def test_what_differs_between_two_versions_is_listed(convoy: Convoy, versions: Versions, tmp_path: Path) -> None:
    done = convoy("data", "diff", versions.before, versions.after, "--out", str(tmp_path / "changes.csv"))
    assert done.status == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines == [
        "1 removed, 1 relabelled",
        "change file earlier later",
        "removed dog/5.png dog",
        "relabelled cat/3.png cat dog",
    ]
    with (tmp_path / "changes.csv").open() as file:
        assert list(csv.reader(file)) == [
            ["kind", "path", "earlier", "later"],
            ["removed", "dog/5.png", "dog", ""],
            ["relabelled", "cat/3.png", "cat", "dog"],
        ]
    changes = json.loads(convoy("data", "diff", versions.before, versions.after, "--json").stdout)
    assert changes == [
        {"kind": "removed", "path": "dog/5.png", "earlier": "dog", "later": ""},
        {"kind": "relabelled", "path": "cat/3.png", "earlier": "cat", "later": "dog"},
    ]
    same = convoy("data", "diff", versions.before, versions.before)
    assert (same.status, same.stdout) == (0, "no change\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "abcdef0123"], "no run abcdef0123"),
        (["show", "nobodys"], "no model is called 'nobodys'"),
        (["diff", "nobodys", "nobodys"], "no model is called"),
        (["show", "nobodys", "--out", "missing/file.csv"], "--out"),
    ],
)
def test_what_is_no_data_is_named(convoy: Convoy, stack: object, arguments: list[str], words: str) -> None:
    done = convoy("data", *arguments)
    assert done.status == 2 and words in done.complaint


def test_a_table_is_checked_without_servers(convoy: Convoy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = laid_out(PHOTOS, tmp_path / "d")
    good = table(folder / "good.csv", {path: path.split("/")[0] for path in PHOTOS})
    done = convoy("data", "check", str(good))
    assert (done.status, done.stdout) == (0, "40 rows, 2 labels, columns camera: no fault\n")
    (folder / "bad.csv").write_text("path,class\n" + "cat/1.png, cat\n" * 7)
    done = convoy("data", "check", str(folder / "bad.csv"), "--set", "data.columns.label=class")
    assert done.status == 2 and done.stdout.splitlines() == [
        f"row {row} has blanks around its label ' cat'" for row in range(2, 9)
    ]
    assert done.complaint.endswith("bad.csv: 7 faults; correct the table")
    bad = convoy("data", "check", str(folder / "bad.csv"), "--set", "data.columns.label=class", "--json")
    assert (bad.status, json.loads(bad.stdout)) == (2, {"faults": done.stdout.splitlines(), "missing": []})
    monkeypatch.chdir(folder)
    Path("convoy.yaml").write_text("data: {columns: {label: class}}\ndeploy: {pool: ours}")
    assert convoy("data", "check", "bad.csv", "--json").stdout == bad.stdout
    Path("convoy.yaml").unlink()
    (folder / "cat/3.png").unlink()
    done = convoy("data", "check", str(good))
    assert (done.status, done.stdout) == (2, "row 5: no file cat/3.png\n")
    found = json.loads(convoy("data", "check", str(good), "--json").stdout)
    assert found == {"faults": [], "missing": [{"row": 5, "path": "cat/3.png"}]}
    assert not Settings().home.joinpath("servers").exists() or not any(tmp_path.rglob("*.pid"))
    (folder / "convoy.yaml").write_text("data: {columns: {label: class}}\ndeploy: {pool: ours}")
    monkeypatch.chdir(folder)
    assert convoy("data", "check", "bad.csv").complaint.endswith("bad.csv: 7 faults; correct the table")
    assert "there is no such label table" in convoy("data", "check", str(folder / "none.csv")).complaint
    assert "cat has no metadata.csv about its images" in convoy("data", "check", str(folder / "cat")).complaint
    (folder / "metadata.csv").write_text("path,camera\ncat/4.png,x\ncat/no.png,x\n")  # the folders give the labels
    done = convoy("data", "check", str(folder))
    assert (done.status, done.stdout) == (2, "row 3: no file cat/no.png\n")
    (folder / "metadata.csv").write_text("path,camera\ncat/4.png,x\n")
    assert convoy("data", "check", str(folder)).stdout == "1 row, columns camera: no fault\n"
    beside = convoy("data", "check", str(folder / "metadata.csv"), "--set", "data.columns.label=label")
    assert "metadata.csv has no column 'label'" in beside.complaint  # as a data set of its own
    (folder / "metadata.csv").write_text("path,camera\n../9.png,x\n")
    assert convoy("data", "check", str(folder)).status == 2
