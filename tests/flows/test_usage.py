"""`convoy predict`, `errors` and `export`, as people run them."""

import csv
import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from prefect.artifacts import Artifact
from typer.models import CommandInfo

from infra.tracking.model_registry import set_alias
from tasks.evaluation.reference_images import load_reference
from tests.flows.conftest import Convoy
from tests.tasks.registered import Registered, register_digits

NAME = "usage-tests"


@pytest.fixture(scope="module")
def registered(stack: object, quiet_prefect: None, tmp_path_factory: pytest.TempPathFactory) -> Registered:
    made = register_digits(NAME, tmp_path_factory.mktemp("weights"))
    set_alias(made.version, "champion")
    return made


@pytest.fixture
def photos(registered: Registered, tmp_path: Path) -> Path:
    """Five images and one that is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, image in enumerate(load_reference(registered.store, registered.evaluated.reference_key)["images"][:5]):
        Image.fromarray(image[0].numpy()).save(folder / f"{number}.png")
    (folder / "bad.png").write_text("text")
    return folder


@pytest.fixture
def convoy(convoy: Convoy, monkeypatch: pytest.MonkeyPatch) -> Convoy:
    """`convoy` with these commands, wherever the application gets them from."""
    from flows.cli import app, prediction

    names = ("predict", "errors", "export")
    others = [each for each in app.app.registered_commands if getattr(each.callback, "__name__", "") not in names]
    ours = [CommandInfo(name=name, callback=getattr(prediction, name)) for name in names]
    monkeypatch.setattr(app.app, "registered_commands", [*others, *ours])
    return convoy


@pytest.mark.long
def test_predict_writes_a_table_and_names_what_it_could_not_use(convoy: Convoy, photos: Path, tmp_path: Path) -> None:
    done = convoy("predict", f"{NAME}@champion", str(photos), "--out", str(tmp_path / "out.csv"))
    assert done.status == 0, done.stderr
    assert "5, unreadable 1" in done.stdout
    assert f"not used: {photos / 'bad.png'}: not a PNG, JPEG, WebP or BMP image" in done.stderr
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["file"]).name for row in rows] == ["0.png", "1.png", "2.png", "3.png", "4.png", "bad.png"]
    page = str(Artifact.get("predictions").data)  # type: ignore[union-attr]
    assert "6 files, 1 unreadable" in page


@pytest.mark.long
def test_export_writes_a_file_that_works(convoy: Convoy, registered: Registered, tmp_path: Path) -> None:
    done = convoy("export", NAME, "--format", "pt2", "--out", str(tmp_path / "model.pt2"))
    assert done.status == 0, done.stderr
    assert "on 64 images" in done.stdout
    reference = load_reference(registered.store, registered.evaluated.reference_key)
    found = torch.export.load(tmp_path / "model.pt2").module()(reference["images"])
    assert torch.allclose(found, reference["probabilities"], atol=1e-5)


@pytest.mark.long
def test_errors_writes_a_table_and_a_page_and_says_what_was_seen_in_training(
    convoy: Convoy, registered: Registered, tmp_path: Path
) -> None:
    done = convoy("errors", NAME, "--out", str(tmp_path / "errors.csv"))
    assert done.status == 0, done.stderr
    with (tmp_path / "errors.csv").open(newline="") as file:
        splits = [row["split"] for row in csv.DictReader(file)]
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert f", {splits.count('train'):,} labels probably wrong (seen in training)" in lines["train"]
    assert lines["page"] == str(tmp_path / "errors.html")
    assert f"Labels of {NAME}/1" in (tmp_path / "errors.html").read_text()
    assert "images are named by split and position" in done.stderr
    found = json.loads(convoy("errors", NAME, "--out", str(tmp_path / "errors.csv"), "--json").stdout)
    assert (found["model"], found["named"], found["table"]) == (f"{NAME}/1", False, str(tmp_path / "errors.csv"))
    assert found["suspects"] == {split: splits.count(split) for split in found["images"]}


@pytest.mark.long
def test_mistakes_are_one_line(convoy: Convoy, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    edited = tmp_path / "edited.csv"
    edited.write_text("path,label\nx.png,3\n")
    out = ["--out", str(tmp_path / "out.csv")]
    for arguments, hint in (
        (["predict", "usage-test", str(photos), *out], f"did you mean '{NAME}'"),
        (["predict", NAME, str(tmp_path / "empty"), *out], "no PNG, JPEG, WebP or BMP image there"),
        (["predict", NAME, str(photos / "bad.png"), *out], "no usable file among 1"),
        (["predict", NAME, str(photos), "--out", str(tmp_path / "out.txt")], "must end with"),
        (["export", NAME, "--format", "tflite", *out], "choose one of"),
        (["errors", "usage-test", *out], f"did you mean '{NAME}'"),
        (["errors", NAME, "--out", str(tmp_path / "out.json")], "must end with .csv"),
        (["errors", NAME, "--out", str(tmp_path / "no" / "out.csv")], "cannot write there"),
        (["errors", NAME, "--corrected", str(edited), "--out", str(edited)], "would replace the table"),
        (["errors", NAME, "--corrected", str(tmp_path / "none.csv"), *out], "there is no such table"),
        (["errors", NAME, "--corrected", "x" * 300, "--out", str(edited)], "there is no such table"),
        (["errors", NAME, "--corrected", str(edited), *out], "have no file names"),
    ):
        done = convoy(*arguments)
        assert (done.status, done.stdout) == (2, "")
        assert hint in done.complaint
    assert not list(tmp_path.glob("out*"))


@pytest.mark.long
def test_json_lines_are_json(convoy: Convoy, photos: Path, tmp_path: Path) -> None:
    done = convoy("predict", NAME, str(photos / "0.png"), str(photos / "1.png"), "--out", str(tmp_path / "o.jsonl"))
    assert done.status == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [line["error"] for line in lines] == [None, None]


@pytest.mark.long
def test_more_files_than_prefect_takes_as_a_parameter_are_predicted(
    convoy: Convoy, photos: Path, tmp_path: Path
) -> None:
    long = photos / f"{'of_something_' * 18}.png"
    (photos / "0.png").rename(long)
    odd = os.fsdecode(bytes(photos / "1") + b"\xff.png")  # no Unicode, so no JSON
    (photos / "1.png").rename(odd)
    many = [str(long)] * (600_000 // len(str(long)))
    done = convoy("predict", NAME, *many, "--out", str(tmp_path / "o.csv"))
    assert done.status == 0, done.stderr
    assert len((tmp_path / "o.csv").read_text().splitlines()) == len(many) + 1
    assert convoy("predict", NAME, odd, "--out", str(tmp_path / "o.csv")).status == 0
