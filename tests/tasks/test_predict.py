"""Prediction on the real stack: any inputs, the decoding of preprocessing, and tables in three formats."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from mlflow.tracking import MlflowClient
from PIL import Image
from prefect import flow
from safetensors.numpy import load_file

from cnn.config.preprocessing import PreprocessConfig, Resize
from cnn.data.shard_writer import shard_path
from cnn.formats.decode import Target, decode_image
from cnn.preprocessing.pack import preprocess
from infra.errors import Outage, ServiceError, UsageError
from infra.storage.object_store import ObjectStore
from infra.tracking.model_registry import set_alias
from infra.tracking.model_versions import find_version
from infra.tracking.served_model import ServedModel
from tasks.evaluation.reference_images import load_reference
from tasks.prediction.export import export
from tasks.prediction.inputs import pictures, target_of
from tasks.prediction.predict import ImageClassifier, Predictions, _decode, _trained_on_colour, calibrated, predict
from tasks.prediction.table import PredictedBatch, table_writer
from tests.cnn.without_convoy import read_metadata, run_example, save_photo
from tests.tasks.registered import Registered, register_digits

NAME = "predict-tests"


@pytest.fixture(scope="module")
def registered(stack: object, tmp_path_factory: pytest.TempPathFactory) -> Registered:
    made = register_digits(NAME, tmp_path_factory.mktemp("weights"))
    set_alias(made.version, "champion")
    return made


@pytest.fixture(scope="module")
def reference(registered: Registered) -> dict[str, torch.Tensor]:
    return load_reference(registered.store, registered.evaluated.reference_key)


@pytest.fixture(scope="module")
def photos(reference: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference images as PNG files, more than one batch of them, in two folders."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(100):
        file = folder / ("a" if number < 50 else "b") / f"{number:03d}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(reference["images"][number % 64, 0].numpy()).save(file)
    (folder / "b" / "notes.txt").write_text("not an image, and not named like one")
    return folder


def predicting(model: str, inputs: list[Path | str], out: Path | str) -> Predictions:
    @flow
    def run() -> Predictions:
        return predict(model, [str(each) for each in inputs], str(out))

    return run()


@pytest.mark.long
def test_folder_gives_the_evaluated_probabilities_in_order(
    registered: Registered, photos: Path, reference: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    out = tmp_path / "results.parquet"
    done = predicting(NAME, [photos], out)
    assert (done.images, done.unreadable) == (100, 0)
    table = pq.read_table(out)
    assert table.column_names == ["file", "class", "probability", *(f"p_{digit}" for digit in range(10)), "error"]
    rows = table.to_pylist()
    assert [Path(row["file"]).name for row in rows] == [f"{number:03d}.png" for number in range(100)]
    found = torch.tensor([[row[f"p_{digit}"] for digit in range(10)] for row in rows])
    assert done.temperature == registered.evaluated.report.calibration.temperature
    evaluated = reference["probabilities"][torch.arange(100) % 64]
    expected = torch.from_numpy(calibrated(evaluated.numpy(), done.temperature))
    assert torch.allclose(found, expected, atol=1e-5)
    assert [row["class"] for row in rows] == [str(int(best)) for best in expected.argmax(1)]
    assert all(row["probability"] == max(row[f"p_{digit}"] for digit in range(10)) for row in rows)
    assert sum(done.classes.values()) == 100
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.long
def test_formats_hold_the_same(photos: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_text("text")
    inputs: list[Path | str] = [photos / "a", bad]
    for ending in ("parquet", "csv", "json"):
        predicting(f"{NAME}@champion", inputs, tmp_path / f"out.{ending}")
    lines = [json.loads(line) for line in (tmp_path / "out.json").read_text().splitlines()]
    with (tmp_path / "out.csv").open(newline="") as file:
        texts = list(csv.DictReader(file))
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert len(lines) == 51
    assert rows == lines
    assert [{key: "" if value is None else str(value) for key, value in row.items()} for row in rows] == texts


def test_unreadable_files_are_listed_and_stop_nothing(photos: Path, tmp_path: Path) -> None:
    text, cut, gone = tmp_path / "text.png", tmp_path / "cut.png", tmp_path / "letter.txt"
    text.write_text("text")
    cut.write_bytes((photos / "a" / "000.png").read_bytes()[:60])
    gone.write_text("a letter, named by itself")
    done = predicting(f"{NAME}/1", [text, photos / "a" / "001.png", cut, gone], tmp_path / "out.csv")
    assert (done.images, done.unreadable) == (4, 3)
    assert [each.file for each in done.unreadable_examples] == [str(text), str(cut), str(gone)]
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [bool(row["error"]) for row in rows] == [True, False, True, True]
    assert [bool(row["class"]) for row in rows] == [False, True, False, False]
    assert "not a PNG, JPEG, WebP or BMP image" in rows[0]["error"]


def test_nothing_readable_is_a_mistake_and_writes_no_table(registered: Registered, tmp_path: Path) -> None:
    text = tmp_path / "text.png"
    text.write_text("text")
    with pytest.raises(UsageError, match="no usable file among 1"):
        predicting(NAME, [text], tmp_path / "out.csv")
    assert list(tmp_path.iterdir()) == [text]


def test_other_channels_are_converted_only_where_that_is_clear(photos: Path, tmp_path: Path) -> None:
    grey = Image.open(photos / "a" / "000.png")
    for mode in ("RGB", "RGBA", "P"):
        grey.convert(mode).save(tmp_path / f"{mode}.png")
    grey.convert("RGB").save(tmp_path / "photo.jpg", quality=95)
    Image.fromarray(np.asarray(grey).astype(np.uint16) << 8).save(tmp_path / "wide.png")
    colour = Image.new("RGB", (8, 8), "red")
    colour.save(tmp_path / "colour.png")
    done = predicting(NAME, [photos / "a" / "000.png", tmp_path], tmp_path / "out.json")
    lines = [json.loads(line) for line in (tmp_path / "out.json").read_text().splitlines()]
    answers = {Path(line["file"]).name: line for line in lines}
    assert [each.file for each in done.unreadable_examples] == [str(tmp_path / "colour.png")]
    assert "trained on grey ones only" in answers["colour.png"]["error"]
    for name in ("RGB.png", "RGBA.png", "P.png", "wide.png"):
        assert answers[name]["p_3"] == pytest.approx(answers["000.png"]["p_3"], abs=1e-6)
    assert answers["photo.jpg"]["class"] is not None


def save_photographs(folder: Path) -> None:
    """Writes wide and tall photographs: plain, turned by EXIF, large JPEG, transparent, 16-bit grey."""
    small = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    photo = Image.fromarray(small).resize((1200, 790), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    transparent = photo.convert("RGBA")
    transparent.putalpha(photo.convert("L"))
    wide = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) << 8)
    for name, image in {"photo.jpg": photo, "clear.png": transparent, "deep.png": wide}.items():
        for turned in (False, True):
            place = folder / "ab"[turned] / name
            place.parent.mkdir(parents=True, exist_ok=True)
            (image.transpose(Image.Transpose.ROTATE_90) if turned else image).save(place)
        image.save(folder / "a" / f"turned-{name}", exif=exif)


@pytest.mark.long
@pytest.mark.parametrize("resize", get_args(Resize))
@pytest.mark.parametrize("channels", [1, 3])
def test_files_become_the_pixels_that_are_packed_for_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resize: Resize, channels: int
) -> None:
    save_photographs(tmp_path / "photos")
    files = {path.relative_to(tmp_path / "photos").as_posix(): path for path in (tmp_path / "photos").rglob("*.*g")}
    parts = {f"{split}/{name}": path for split in ("train", "val", "test") for name, path in files.items()}
    (tmp_path / "out").mkdir()
    manifest = preprocess(
        "folder", parts, PreprocessConfig(image_size=40, resize=resize, channels=channels), tmp_path / "out"
    )
    (shard,) = manifest.splits["test"].shards
    packed = load_file(shard_path(tmp_path / "out", shard.sha256))["images"]
    monkeypatch.setattr(ServedModel, "_model", loaded_model((channels, 40, 40), resize=manifest.resize))
    monkeypatch.setattr("tasks.prediction.predict._trained_on_colour", lambda version: True)
    classifier = ImageClassifier(SimpleNamespace(temperature=1.0))  # type: ignore[arg-type]
    batch = _decode(list(pictures([str(tmp_path / "photos")])), classifier)
    assert len(packed) == 9 and not batch.unread
    assert (batch.images == packed).all()


def test_colour_images_are_refused_only_if_the_training_data_are_known_to_be_grey(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.prediction.predict.open_bucket", lambda: store)
    assert _trained_on_colour("0" * 64)  # pruned since

    def away(*_: object) -> None:
        raise Outage("the store is away")

    monkeypatch.setattr("tasks.prediction.predict.load_manifest", away)
    with pytest.raises(Outage):
        _trained_on_colour("0" * 64)


def loaded_model(shape: tuple[int, ...], **metadata: object) -> SimpleNamespace:
    """What MLflow makes of the files of a version for images [C, H, W]."""
    signature = SimpleNamespace(inputs=SimpleNamespace(inputs=[SimpleNamespace(shape=(-1, *shape))]))
    return SimpleNamespace(metadata=SimpleNamespace(metadata={"classes": ["a", "b"], **metadata}, signature=signature))


def test_versions_that_do_not_say_how_they_see_rectangles_crop_them(monkeypatch: pytest.MonkeyPatch) -> None:
    served = ServedModel(SimpleNamespace(uri="models:/photos/1"))  # type: ignore[arg-type]
    monkeypatch.setattr(ServedModel, "_model", loaded_model((3, 40, 40)))
    assert target_of(served) == Target(40, 3, "crop")
    monkeypatch.setattr(ServedModel, "_model", loaded_model((3, 40, 40), resize="fisheye"))
    with pytest.raises(UsageError, match="models:/photos/1 makes images square by 'fisheye', which this version"):
        target_of(served)


@pytest.mark.long
def test_photographs_of_any_shape_are_predicted_as_the_version_was_trained(
    stack: object, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    made = register_digits("predict-padded", tmp_path_factory.mktemp("weights"), {"resize": "pad"})
    version = find_version(made.version.address)
    save_photographs(tmp_path / "photos")
    for path in (tmp_path / "photos").rglob("*.*g"):
        if path.name.endswith("deep.png"):
            continue
        path.unlink()  # the digits are grey
    predicting("predict-padded/1", [tmp_path / "photos"], tmp_path / "out.json")
    lines = [json.loads(line) for line in (tmp_path / "out.json").read_text().splitlines()]
    files = [Path(line["file"]) for line in lines]
    assert [file.name for file in files] == ["deep.png", "turned-deep.png", "deep.png"]
    images = np.stack([decode_image(file.read_bytes(), Target(8, 1, "pad")) for file in files])
    assert not (images == np.stack([decode_image(file.read_bytes(), Target(8, 1)) for file in files])).all()
    wanted = ImageClassifier(version).probabilities(images)
    assert np.allclose([[line[f"p_{digit}"] for digit in range(10)] for line in lines], wanted, atol=1e-6)
    done = export("predict-padded/1", "safetensors", tmp_path / "model.safetensors")
    save_photo(tmp_path)
    found, _, _ = run_example(read_metadata(done.out)["example"], tmp_path)
    assert np.array_equal(found[0], decode_image((tmp_path / "photo.jpg").read_bytes(), Target(8, 1, "pad")))


@pytest.mark.long
def test_inputs_and_results_may_be_in_a_bucket(photos: Path, registered: Registered, tmp_path: Path) -> None:
    store = registered.store
    for name in ("000.png", "001.png"):
        store.put_file(f"photos/{name}", photos / "a" / name)
    store.put_bytes("photos/notes.txt", b"left out")
    store.put_bytes("photos2/000.png", b"another folder")
    done = predicting(NAME, [store.uri("photos"), store.uri("photos/001.png")], store.uri("results/out.csv"))
    assert (done.images, done.unreadable) == (3, 0)
    rows = list(csv.DictReader(store.get_bytes("results/out.csv").decode().splitlines()))
    assert [row["file"] for row in rows] == [store.uri(f"photos/{name}") for name in ("000.png", "001.png", "001.png")]
    with pytest.raises(ServiceError, match="no such bucket"):
        predicting(NAME, ["s3://no-such-bucket-here/x"], tmp_path / "out.csv")


def test_an_object_that_was_deleted_meanwhile_is_a_row_with_a_reason(
    photos: Path, registered: Registered, tmp_path: Path
) -> None:
    classifier, photo = ImageClassifier(find_version(NAME)), photos / "a" / "000.png"
    for name in ("there", "gone"):
        registered.store.put_file(f"fleeting/{name}.png", photo)
    found = list(pictures([registered.store.uri("fleeting"), registered.store.uri("fleeting/there.png")]))
    registered.store.delete("fleeting/gone.png")
    batch = _decode(found, classifier)
    assert batch.reasons == ("no such object", None, None)

    def denied() -> bytes:
        raise ServiceError("access denied")

    with pytest.raises(ServiceError, match="denied"):
        _decode([found[0]._replace(read=denied)], classifier)


def test_of_two_files_with_one_name_only_the_unreadable_one_has_no_class(tmp_path: Path) -> None:
    batch = PredictedBatch(("x.png", "x.png"), np.zeros((1, 1, 8, 8), np.uint8), (None, "truncated"))
    assert [(each.file, each.reason) for each in batch.unread] == [("x.png", "truncated")]
    with table_writer(tmp_path / "out.csv", ("a", "b")) as write:
        write(batch, np.array([[0.25, 0.75]], np.float32))
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["class"], row["error"]) for row in rows] == [("b", ""), ("", "truncated")]


@pytest.mark.long
def test_temperature_of_the_version_calibrates(registered: Registered, photos: Path, tmp_path: Path) -> None:
    client, version = MlflowClient(), registered.version
    client.set_model_version_tag(NAME, version.version, "convoy.temperature", "1")
    predicting(NAME, [photos / "a"], tmp_path / "before.parquet")
    client.set_model_version_tag(NAME, version.version, "convoy.temperature", "2.5")
    try:
        assert predicting(NAME, [photos / "a"], tmp_path / "after.parquet").temperature == 2.5
        client.set_model_version_tag(NAME, version.version, "convoy.temperature", "warm")
        with pytest.raises(UsageError, match=r"'warm', not a positive number"):
            predicting(NAME, [photos / "a"], tmp_path / "never.parquet")
    finally:
        fitted = str(registered.evaluated.report.calibration.temperature)
        client.set_model_version_tag(NAME, version.version, "convoy.temperature", fitted)
    before, after = (pq.read_table(tmp_path / f"{name}.parquet").to_pandas() for name in ("before", "after"))
    assert (before["class"] == after["class"]).all()
    assert (after["probability"] < before["probability"]).all()


def test_calibration_is_that_of_the_logits() -> None:
    logits = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)) * 4
    found = calibrated(logits.softmax(1).numpy(), 3.0)
    assert np.allclose(found, (logits / 3).softmax(1).numpy(), atol=1e-6)
    sure = np.array([[1.0, 0.0, 0.0]], dtype=np.float32)
    assert np.array_equal(calibrated(sure, 2.0), sure)


@pytest.mark.long
@pytest.mark.parametrize(
    "model, hint",
    [
        ("predict-test", "did you mean 'predict-tests'"),
        (f"{NAME}@winner", f"aliases: {NAME}@champion"),
        (f"{NAME}/77", "versions: 1 to 1"),
        (f"{NAME}/one", "has no version 'one'"),
        (f"{NAME}@", "predict"),
        ("@champion", "names no model"),
    ],
)
def test_model_that_is_not_there_is_named_with_what_is(
    registered: Registered, photos: Path, tmp_path: Path, model: str, hint: str
) -> None:
    if model == f"{NAME}@":  # an empty alias is no alias: the champion
        assert hint in predicting(model, [photos / "a"], tmp_path / "out.csv").model
        return
    with pytest.raises(UsageError, match=hint):
        predicting(model, [photos], tmp_path / "out.csv")


def test_inputs_that_are_none_are_refused(tmp_path: Path, store: ObjectStore) -> None:
    (tmp_path / "empty").mkdir()
    for given, hint in (
        (tmp_path / "empty", "no PNG, JPEG, WebP or BMP image there"),
        (tmp_path / "missing", "no such file or folder"),
        (store.uri("nothing/here"), "no PNG, JPEG, WebP or BMP image there"),
        ("https://example.org/a.png", "name files, a folder, or an s3:// address"),
        ("s3:///key", "names no bucket"),
    ):
        with pytest.raises(UsageError, match=hint):
            list(pictures([str(given)]))


@pytest.mark.parametrize("out, hint", [("out.xlsx", "must end with"), ("no/folder/out.csv", "cannot write there")])
def test_place_for_the_table_is_checked_first(tmp_path: Path, out: str, hint: str) -> None:
    with pytest.raises(UsageError, match=hint):
        predict.fn("whatever", ["nothing"], str(tmp_path / out))
