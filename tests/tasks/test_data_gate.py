"""The data gate on the real stack: what it publishes, where, and what it refuses."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow.artifacts import download_artifacts
from mlflow.tracking import MlflowClient
from PIL import Image
from prefect import flow
from prefect.artifacts import Artifact
from prefect.context import refresh_global_settings_context

from cnn.config.data_checks import DataGateConfig
from cnn.config.preprocessing import PreprocessConfig
from cnn.data.checks import DataChecks
from cnn.data.manifest import SplitInfo
from cnn.data.shard_writer import ShardWriter, shard_path
from infra.settings import Settings
from infra.storage import bucket_layout
from infra.storage.cache import Cache
from infra.storage.object_store import ObjectStore
from infra.tracking import mlflow_runs
from tasks.data.contact_sheet import contact_sheet
from tasks.data.data_gate import DataRefused, DataReport, data_gate, log_data_report
from tasks.data.dataset import DatasetRef, load_manifest, open_split
from tasks.data.download import download
from tasks.data.preprocess import preprocess


@dataclass(frozen=True)
class Versions:
    """Digits as they are, and digits whose test split holds some training images and an empty one."""

    store: ObjectStore
    good: DatasetRef
    bad: DatasetRef


@pytest.fixture(scope="module")
def versions(stack: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Versions]:
    refresh_global_settings_context()  # Prefect was imported before the stack named its server
    folder = tmp_path_factory.mktemp("data-gate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONVOY_HOME", str(folder / "home"))

        @flow
        def prepare() -> DatasetRef:
            return preprocess(download("digits"), PreprocessConfig())

        good = prepare()
        store = ObjectStore.connect(Settings().bucket)
        yield Versions(store, good, spoiled(store, good, folder))


def spoiled(store: ObjectStore, good: DatasetRef, folder: Path) -> DatasetRef:
    manifest = load_manifest(store, good.version)
    cache = Cache(Settings().cache, store)
    images, labels = (tensor.numpy().copy() for tensor in open_split(cache, manifest, "test").slice(0, 10_000))
    theirs, their_labels = open_split(cache, manifest, "train").slice(0, 20)
    images[:20], labels[:20] = theirs.numpy(), their_labels.numpy()
    images[20] = 0
    writer = ShardWriter(folder, images.shape[1:])
    writer.add(images, labels)
    shards = writer.close()
    for shard in shards:
        store.put_file(bucket_layout.shard(shard.sha256), shard_path(folder, shard.sha256))
    test = SplitInfo(count=len(labels), class_counts=manifest.splits["test"].class_counts, shards=shards)
    changed = manifest.model_copy(update={"splits": {**manifest.splits, "test": test}})
    store.put_bytes(bucket_layout.dataset_manifest(changed.version), changed.to_bytes())
    return DatasetRef(version=changed.version, name="spoiled")


def gate(dataset: DatasetRef, champion: str | None = None, *, warm_start: bool = False, **config: object) -> DataReport:
    @flow
    def run() -> DataReport:
        conditions = DataGateConfig.model_validate(config)
        return data_gate(dataset, conditions, champion, oldest=champion, warm_start=warm_start)

    return run()


def outcomes(report: DataReport) -> dict[str, str]:
    return {check.name: check.outcome for check in report.checks.checks}


@pytest.mark.long
def test_good_data_pass_and_the_report_is_in_the_bucket_and_in_prefect(versions: Versions) -> None:
    report = gate(versions.good)
    assert report.checks.outcome == "passed"
    kept = versions.store.get_bytes(report.prefix + "data.json")
    assert DataChecks.model_validate_json(kept) == report.checks
    assert gate(versions.good).prefix == report.prefix  # equal reports are one
    page = str(Artifact.get("data-gate").data)  # type: ignore[union-attr]
    assert "**digits: passed**" in page
    assert versions.good.version in page
    assert versions.store.uri(report.prefix + "data_samples.png") in page
    assert "| leakage | passed | 0 | 0.01 |" in page


@pytest.mark.long
def test_samples_are_drawn_once_per_report(versions: Versions) -> None:
    key = gate(versions.good).prefix + "data_samples.png"
    versions.store.put_bytes(key, b"drawn before")
    gate(versions.good)
    assert versions.store.get_bytes(key) == b"drawn before"
    versions.store.delete(key)
    gate(versions.good)
    assert versions.store.get_bytes(key).startswith(b"\x89PNG")


def test_refused_data_raise_after_the_report_is_published(versions: Versions) -> None:
    with pytest.raises(DataRefused) as refusal:
        gate(versions.bad)
    said = str(refusal.value)
    assert refusal.value.exit_status == 3
    assert said.startswith("dataset spoiled is refused: leakage is 0.0")
    assert "test 20 of" in said and "data_gate.leakage" in said and "\n" not in said
    prefix = f"reports/data/{versions.bad.version}/"
    keys = [info.key.rpartition("/")[2] for info in versions.store.list(prefix)]
    assert keys == ["data.json", "data.md", "data_samples.png"]
    page = str(Artifact.get("data-gate").data)  # type: ignore[union-attr]
    assert "**spoiled: refused**" in page
    assert "| leakage | test 0 |" in page and "equals train 0" in page
    assert "| constant | test 20 |" in page


@pytest.mark.long
def test_check_that_only_warns_lets_the_data_pass(versions: Versions) -> None:
    report = gate(versions.bad, leakage="warn")
    assert report.checks.outcome == "warned"
    assert outcomes(report)["leakage"] == "warned"


def test_data_that_cannot_be_compared_with_the_champions_are_told_before_they_are_trained_on(
    versions: Versions, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = load_manifest(versions.store, versions.bad.version).model_copy(update={"resize": "pad"})
    versions.store.put_bytes(bucket_layout.dataset_manifest(manifest.version), manifest.to_bytes())
    gate(versions.good, versions.bad.version)
    assert "unless you set these keys to" not in caplog.text
    gate(versions.good, manifest.version)
    assert (
        "data.channels=1 data.resize=crop, those of the champion data.image_size=8 data.channels=1 data.resize=pad"
        in (caplog.text)
    )


@pytest.mark.long
def test_champions_data_are_compared_with(versions: Versions) -> None:
    compared = ("missing_classes", "new_classes", "class_drift", "pixel_drift")
    same, other = gate(versions.good, versions.good.version), gate(versions.good, versions.bad.version)
    for report in (same, other):
        assert {outcomes(report)[name] for name in compared} == {"passed"}
    assert other.checks.champion_version == versions.bad.version
    gone = gate(versions.good, "0" * 64)
    assert {outcomes(gone)[name] for name in compared} == {"skipped"}
    assert gone.checks.champion_version is None


@pytest.mark.long
def test_warm_start_on_images_that_the_champion_learned_is_refused(versions: Versions) -> None:
    """A version whose training split is the good one's test split, as another seed could have it."""
    manifest = load_manifest(versions.store, versions.good.version)
    swapped = {**manifest.splits, "train": manifest.splits["test"]}
    champion = manifest.model_copy(update={"splits": swapped})
    versions.store.put_bytes(bucket_layout.dataset_manifest(champion.version), champion.to_bytes())
    report = gate(versions.good, champion.version)
    learned = next(check for check in report.checks.checks if check.name == "trained_on")
    assert (learned.outcome, learned.value) == ("warned", pytest.approx(1, abs=0.02))
    with pytest.raises(DataRefused, match=r"a warm start on digits is refused.*trained_on is .*set warm_start=false"):
        gate(versions.good, champion.version, warm_start=True)
    gate(versions.good, champion.version, warm_start=True, max_trained_on=1)
    gate(versions.good, versions.good.version, warm_start=True)


@pytest.mark.long
def test_report_goes_into_the_run_that_is_opened_later(versions: Versions, tmp_path: Path) -> None:
    report = gate(versions.bad, versions.good.version, leakage="warn")
    run_id = mlflow_runs.start_run("data-gate-tests", "run", {}, {})
    log_data_report(run_id, report)
    run = MlflowClient().get_run(run_id)
    assert run.data.tags["convoy.data_gate"] == "warned"
    drift = next(check.value for check in report.checks.checks if check.name == "pixel_drift")
    assert run.data.metrics["data/pixel_drift"] == drift
    folder = Path(download_artifacts(run_id=run_id, artifact_path="report", dst_path=str(tmp_path)))
    assert json.loads((folder / "data.json").read_text())["dataset_version"] == versions.bad.version
    assert (folder / "data.md").read_text().startswith("**spoiled: passed with warnings**")
    with Image.open(folder / "data_samples.png") as sheet:
        assert min(sheet.size) > 500
        assert len(set(sheet.convert("L").get_flattened_data())) > 100  # there is something on it


def test_contact_sheet_shows_every_class_and_the_images_complained_of(versions: Versions) -> None:
    checks = gate(versions.bad, leakage="warn").checks
    cache, manifest = Cache(Settings().cache, versions.store), load_manifest(versions.store, versions.bad.version)
    figure = contact_sheet(checks, {split: open_split(cache, manifest, split) for split in manifest.splits})
    samples, *sections = [axes for axes in figure.axes if axes.images]
    assert [label.get_text() for label in samples.get_yticklabels()] == list(manifest.classes)
    offenders = [pair for axes in sections for pair in zip(axes.texts, axes.images, strict=True)]
    assert len(offenders) == len(checks.offenders) > 8
    caption, empty = next(pair for pair in offenders if "contrast 0" in pair[0].get_text())
    assert caption.get_text().startswith("test 20: ")
    assert not empty.get_array().any()  # type: ignore[union-attr]


def test_report_survives_json(versions: Versions) -> None:
    report = gate(versions.good)
    assert DataReport.model_validate_json(report.model_dump_json()) == report
