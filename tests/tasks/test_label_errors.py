"""`convoy errors`: the table, the page, and what a person's corrections become."""

import base64
import csv
import io
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from cnn.data.mapped_split import MappedSplit
from cnn.data.splits import SPLITS, Split
from cnn.evaluation.evaluate import EVAL_BATCH
from cnn.evaluation.label_errors import find_label_errors
from infra.errors import UsageError
from infra.sources.label_table import LabelTable, TableOptions
from infra.storage.cache import Cache
from infra.storage.object_store import ObjectStore, open_bucket
from infra.tracking.model_versions import find_version
from infra.tracking.served_model import ServedModel
from tasks.config.run import RunConfig
from tasks.data.dataset import load_manifest, open_split
from tasks.data.dataset_diff import differences
from tasks.data.download import download
from tasks.data.image_index import ImageIndex, load_index
from tasks.data.preprocess import preprocess
from tasks.prediction.corrections import corrected_table, read_corrections, write_corrected
from tasks.prediction.label_errors import COLUMNS, dataset_of, named, write_label_errors, write_table
from tasks.prediction.label_errors_page import SHOWN, FoundLabelErrors, Suspect, label_errors_page
from tasks.prediction.predict import calibrated
from tests.tasks.registered import Registered, register_digits

NAME = "label-errors-tests"


def index_of(rows: Mapping[Split, list[tuple[str | None, str]]], **columns: list[str | None]) -> ImageIndex:
    """Returns an index of paths and labels per split, and further columns."""
    places = [(split, position, *row) for split in SPLITS for position, row in enumerate(rows.get(split, ()))]
    split, position, path, label = (list(each) for each in zip(*places, strict=True))
    text = pa.large_string()
    own = {"split": split, "position": position, "label": label, "path": pa.array(path, text)}
    further = {name: pa.array(values, text) for name, values in ({"group": [None] * len(places)} | columns).items()}
    return ImageIndex(pa.table(own | further))


INDEX = index_of(
    {
        "train": [("cat/1.png", "cat"), ("cat/2, small.png", "cat"), ('dog/"3".png', "dog")],
        "val": [("dog/4.png", "dog")],
        "test": [("cat/5.png", "cat"), ("=dog/6.png", "dog")],
    }
)


def suspect(path: str, position: int = 0, split: Split = "test", given: str = "cat", suggested: str = "dog") -> Suspect:
    return Suspect(split, position, path, given, 0.02, suggested, 0.97, 0.975)


def test_images_are_named_by_the_index_and_by_their_place() -> None:
    labels, probabilities = np.array([0, 1, 0]), np.array([[0.1, 0.9], [0.8, 0.2], [0.9, 0.1]], dtype=np.float32)
    found = find_label_errors(probabilities, labels)
    rows = list(named(found, {"val": 1, "test": 2}, ("cat", "dog"), INDEX))
    assert [(each.split, each.position, each.path, each.given, each.suggested) for each in rows] == [
        ("val", 0, "dog/4.png", "cat", "dog"),
        ("test", 0, "cat/5.png", "dog", "cat"),
    ]
    assert [round(each.score, 6) for each in rows] == [0.9, 0.8]
    without = list(named(found, {"val": 1, "test": 2}, ("cat", "dog"), None))
    assert without == [each._replace(path="") for each in rows]


def test_table_is_a_label_table_with_the_given_labels(tmp_path: Path) -> None:
    write_table(tmp_path / "errors.csv", [suspect('a, "b".png'), suspect("c\n.png", 7, "train", "0", "01")])
    with (tmp_path / "errors.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows == [
        list(COLUMNS),
        ['a, "b".png', "cat", "dog", "0.975000", "test", "0"],
        ["c\n.png", "0", "01", "0.975000", "train", "7"],
    ]
    read = read_corrections(tmp_path / "errors.csv")
    assert (read.required("path"), read.required("label")) == (['a, "b".png', "c\n.png"], ["cat", "0"])


@pytest.fixture
def splits(tmp_path: Path) -> dict[Split, MappedSplit]:
    """Sixty digits in three splits."""
    images = torch.from_numpy(load_digits().images[:60] * 15).to(torch.uint8).unsqueeze(1)
    found: dict[Split, MappedSplit] = {}
    for split, part in zip(SPLITS, images.split([30, 10, 20]), strict=True):
        file = tmp_path / f"{split}.safetensors"
        save_file({"images": part.contiguous(), "labels": torch.zeros(len(part), dtype=torch.int64)}, file)
        found[split] = MappedSplit([file])
    return found


def summary(suspects: list[Suspect], named: bool = True) -> FoundLabelErrors:
    return FoundLabelErrors(
        model="<b>/3",
        name="<b>",
        images={"train": 30, "val": 10, "test": 20},
        suspects={split: sum(each.split == split for each in suspects) for split in SPLITS},
        named=named,
        table=Path("errors <i>.csv"),
        page=Path("errors.html"),
    )


def test_page_shows_each_image_with_its_labels_and_escapes_every_name(splits: dict[Split, MappedSplit]) -> None:
    odd = "<script>alert('1')</script>"
    suspects = [suspect(f"{odd}.png", 3, "val", odd, "dog & cat"), suspect("a.png", 29, "train"), suspect("", 2)]
    page = label_errors_page(summary(suspects), suspects, splits)
    assert "<script" not in page and "<b>/3" not in page and "<i>" not in page
    shown = page.split("<figure>")[1:]
    assert len(shown) == 3
    for figure, (split, position) in zip(shown, [("val", 3), ("train", 29), ("test", 2)], strict=True):
        source = re.search(r'src="data:image/webp;base64,([^"]+)"', figure)
        assert source
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(source[1]))))[..., 0].astype(int)
        image = splits[split].slice(position, position + 1)[0][0, 0].numpy().astype(int)  # type: ignore[index]
        assert np.abs(picture - image).mean() < 10  # WebP loses something
        assert f'alt="{split} {position}"' in figure
    assert "&lt;script&gt;alert(&#x27;1&#x27;)&lt;/script&gt;.png" in shown[0]
    assert "label <b>&lt;script&gt;" in shown[0] and "suggested <b>dog &amp; cat</b> (97.0%)" in shown[0]
    assert "score 0.975, val 3" in shown[0]
    assert "<b>3.</b> test 2" in shown[2]
    assert "seen in training" in page and "--corrected" in page


def test_page_shows_the_worst_and_how_many_there_are(splits: dict[Split, MappedSplit]) -> None:
    suspects = [suspect(f"{number}.png", number % 30, "train") for number in range(SHOWN + 20)]
    page = label_errors_page(summary(suspects), suspects, splits)
    assert page.count("<figure>") == SHOWN
    assert f"{SHOWN - 1}.png" in page and f"{SHOWN}.png" not in page
    assert f"<strong>{SHOWN + 20} of 60 images.</strong>" in page
    assert re.search(rf"<td[^>]*>cat</td>\s*<td[^>]*>dog</td>\s*<td[^>]*>{SHOWN + 20}</td>", page)


def test_page_without_names_says_so_and_offers_no_table_to_train_on(splits: dict[Split, MappedSplit]) -> None:
    page = label_errors_page(summary([suspect("")], named=False), [suspect("")], splits)
    assert "no file names" in page and "--corrected" not in page
    assert "0 of 60 images" in label_errors_page(summary([]), [], splits)


@pytest.mark.parametrize(
    "name, content, hint",
    [
        ("missing.csv", None, "there is no such table"),
        ("errors.html", "path,label\na.png,cat\n", "there is no such table"),
        ("errors.csv", "path;label\na;cat\n", "its columns seem to be separated by ';'"),
        ("errors.csv", "path,suggested\na.png,cat\n", "has no column 'label'"),
        ("errors.csv", "path,label\n,cat\n", "row 2 "),
        ("errors.csv", "path,label\na.png,cat\nb.png,\n", "row 3 "),
        ("errors.csv", "path,label\na.png,cat\nb.png,cat \n", "row 3 has blanks around its label"),
        ("errors.csv", "path,label\na.png,cat\na.png,dog\n", "row 3 repeats the path of row 2"),
    ],
)
def test_corrections_that_cannot_be_used_are_named(tmp_path: Path, name: str, content: str | None, hint: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UsageError) as raised:
        read_corrections(tmp_path / name)
    assert str(tmp_path / name) in str(raised.value) and hint in str(raised.value)


def corrections(*rows: tuple[str, str]) -> LabelTable:
    """Returns paths and labels as a table that begins in row 2."""
    path, label = ([row[i] for row in rows] for i in range(2))
    return LabelTable(pa.table({"row": range(2, 2 + len(rows)), "path": path, "label": label}))


def test_corrected_table_has_all_images_with_their_splits() -> None:
    edited = corrections(("dog/4.png", "dog"), ("cat/2, small.png", "dog"))
    table, changed = corrected_table(INDEX.table, edited, ("cat", "dog"), TableOptions())
    assert table.column_names == ["path", "label", "split"]
    assert [tuple(row.values()) for row in table.to_pylist()] == [
        ("cat/1.png", "cat", "train"),
        ("cat/2, small.png", "dog", "train"),
        ('dog/"3".png', "dog", "train"),
        ("dog/4.png", "dog", "val"),
        ("cat/5.png", "cat", "test"),
        ("=dog/6.png", "dog", "test"),
    ]
    assert changed == 1
    assert corrected_table(INDEX.table, corrections(), ("cat", "dog"), TableOptions())[1] == 0


def test_corrected_table_keeps_groups_and_further_columns() -> None:
    rows: dict[Split, list[tuple[str | None, str]]] = {"train": [("a.png", "cat")], "test": [("b.png", "dog")]}
    columns = {"meta.camera": ["left", "right"], "meta.label": [None, "x"]}
    for group, kept in ((["p1", None], []), (["p1", "p2"], ["meta.group"])):
        further = columns | {"meta.group": ["p1", None]}
        index = index_of(rows, group=group, **further)  # type: ignore[arg-type]
        table, _ = corrected_table(index.table, corrections(), ("cat", "dog"), TableOptions())
        assert table.column_names == ["path", "label", "split", "group", "camera", "meta.label", *kept]
        assert table["group"].to_pylist() == group and table["camera"].to_pylist() == ["left", "right"]
    index = index_of(rows, group=["p1", None], **columns, **{"meta.who": ["p1", None]})  # type: ignore[arg-type]
    names = TableOptions(path="file", label="class", group="who")
    table, _ = corrected_table(index.table, corrections(), ("cat", "dog"), names)
    assert table.column_names == ["file", "class", "split", "who", "camera", "label"]


@pytest.mark.parametrize(
    "row, hint",
    [
        (("cat/6.png", "cat"), "row 3 of the corrections: the model's data have no image cat/6.png"),
        (("cat/5.png", "cats"), "row 3 of the corrections: no class is called 'cats'; did you mean 'cat'?"),
        (("cat/5.png", "horse"), "no class is called 'horse'; there are cat, dog"),
    ],
)
def test_corrections_of_no_image_or_to_no_class_are_named(row: tuple[str, str], hint: str) -> None:
    with pytest.raises(UsageError, match=re.escape(hint)):
        corrected_table(INDEX.table, corrections(("cat/1.png", "dog"), row), ("cat", "dog"), TableOptions())


@pytest.fixture(scope="module")
def registered(stack: object, tmp_path_factory: pytest.TempPathFactory) -> Registered:
    return register_digits(NAME, tmp_path_factory.mktemp("weights"))


@pytest.mark.long
def test_registered_version_judges_all_images_of_its_data(registered: Registered, tmp_path: Path) -> None:
    version = find_version(f"{NAME}/1")
    found = write_label_errors(version.address, tmp_path / "errors.csv")
    manifest = load_manifest(registered.store, registered.dataset.version)
    assert found.images == {split: manifest.splits[split].count for split in SPLITS}
    assert (found.model, found.table, found.page) == (f"{NAME}/1", tmp_path / "errors.csv", tmp_path / "errors.html")

    model, expected = ServedModel(version), []
    cache = Cache(tmp_path / "cache", registered.store)
    groups: tuple[tuple[Split, ...], ...] = (("train",), ("val", "test"))
    for group in groups:
        readers = {split: open_split(cache, manifest, split) for split in group}
        places = [(split, position) for split, reader in readers.items() for position in range(len(reader))]
        blocks = [block for reader in readers.values() for block in reader.blocks(EVAL_BATCH)]
        labels = np.concatenate([its for _, its in blocks])
        raw = np.concatenate([model.predict(images.numpy()) for images, _ in blocks])
        probabilities = calibrated(raw, version.temperature)
        for i in find_label_errors(probabilities, labels).index:
            best, label = probabilities[i].argmax(), labels[i]
            score = (1 + probabilities[i, best] - probabilities[i, label]) / 2
            expected.append((float(score), *places[i], manifest.classes[label], manifest.classes[best]))
    expected.sort(key=lambda each: -each[0])
    with found.table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(expected) == sum(found.suspects.values()) > 20
    assert [float(row["score"]) for row in rows] == pytest.approx([score for score, *_ in expected], abs=1e-5)
    listed = {(row["split"], int(row["position"]), row["label"], row["suggested"]) for row in rows}
    assert listed == {tuple(each) for _, *each in expected}
    page = found.page.read_text(encoding="utf-8")
    assert page.count("<figure>") == min(SHOWN, len(rows))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.fixture(scope="module")
def photos(stack: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of digits, with a table of cameras, and a version that was registered with them."""
    folder = tmp_path_factory.mktemp("photos")
    lines = ["path,camera"]
    for number, (image, digit) in enumerate(zip(*load_digits(return_X_y=True), strict=True)):
        if number < 300:
            path = folder / str(digit) / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray((image.reshape(8, 8) * 15).astype(np.uint8)).save(path)
            lines.append(f"{digit}/{number}.png,{number % 3}")
    (folder / "metadata.csv").write_text("\n".join(lines))
    register_digits(f"{NAME}-photos", tmp_path_factory.mktemp("weights"), dataset=str(folder))
    return folder


@pytest.mark.long
def test_corrections_become_a_table_that_relabels_these_images_only(photos: Path, tmp_path: Path) -> None:
    model, out = f"{NAME}-photos/1", photos / "labels.csv"
    errors = write_label_errors(model, tmp_path / "errors.csv")
    assert errors.named
    with errors.table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert all(row["path"].startswith(f"{row['label']}/") and (photos / row["path"]).is_file() for row in rows)

    for row in rows[:3]:
        row["label"] = row["suggested"]
    with errors.table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    out.write_text(f"path,label\n{rows[0]['path']},0\n./9/left-out.png,9\n")
    with pytest.raises(
        UsageError, match=f"labels.csv has 1 row of images that {model} .*, such as 9/left-out.png; name"
    ):
        write_corrected(model, read_corrections(errors.table), out, TableOptions())
    out.write_text("any other text")
    with pytest.raises(UsageError, match=r"would replace a file that is no label table; name another one \(.*column"):
        write_corrected(model, read_corrections(errors.table), out, TableOptions())
    out.write_text(f"path,label\n{rows[0]['path']},0\n")
    out.chmod(0o664)
    done = write_corrected(model, read_corrections(errors.table), out, TableOptions())
    assert out.stat().st_mode & 0o777 == 0o664
    assert errors.page.stat().st_mode == errors.table.stat().st_mode == (photos / rows[0]["path"]).stat().st_mode
    assert (done.name, done.images, done.changed, done.missing) == (f"{NAME}-photos", 300, 3, None)
    elsewhere = write_corrected(model, corrections(), tmp_path / "elsewhere.csv", TableOptions())
    assert (elsewhere.changed, (photos / str(elsewhere.missing)).is_file()) == (0, True)

    with out.open(newline="", encoding="utf-8") as file:
        assert next(csv.reader(file)) == ["path", "label", "split", "camera"]
    config = RunConfig.model_validate({"dataset": str(out)})
    relabelled = preprocess.fn(download.fn(str(out), config.data), config.data)
    store = open_bucket()
    before = load_index(store, find_version(model).required("dataset_version"))
    after = load_index(store, relabelled.version)
    assert before and after
    assert [tuple(change) for change in differences(before, after)] == sorted(
        ("relabelled", row["path"], row["path"].split("/")[0], row["suggested"]) for row in rows[:3]
    )
    assert after.table["meta.camera"].to_pylist() == before.table["meta.camera"].to_pylist()


def test_images_without_names_or_without_data_are_not_corrected(
    registered: Registered, store: ObjectStore, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=f"the images of {NAME}/1 have no file names"):
        write_corrected(f"{NAME}/1", corrections(), tmp_path / "labels.csv", TableOptions())
    with pytest.raises(UsageError, match=f"dataset version .* of {NAME}/1 was removed from the bucket"):
        dataset_of(store, find_version(f"{NAME}/1"))
    assert not list(tmp_path.iterdir())
