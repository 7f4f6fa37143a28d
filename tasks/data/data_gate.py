"""The data gate: a dataset version is checked before a network learns from it, and everyone can see what was found.

The report is kept in the bucket, since refused data never have an MLflow run:
reports/data/<dataset version>/<digest of the report>/{data.json,data.md,data_samples.png}
"""

import hashlib
from pathlib import Path
from tempfile import TemporaryDirectory

from prefect.artifacts import create_markdown_artifact

from cnn.config.data_checks import DataGateConfig
from cnn.data.checks import CHAMPION_CHECKS, SLOW_DRIFT_CHECKS, DataCheck, DataChecks, check_dataset
from cnn.data.manifest import Manifest
from cnn.data.split_reader import SplitReader
from cnn.data.splits import SPLITS
from infra.errors import GateRefused
from infra.records import Record
from infra.storage import bucket_layout
from infra.storage.cache import Cache
from infra.storage.object_store import ObjectStore, open_bucket
from infra.storage.s3_client import ObjectMissing
from infra.tracking import mlflow_runs
from infra.tracking.tags import DATA_GATE
from tasks.data.contact_sheet import contact_sheet
from tasks.data.dataset import DatasetDamaged, DatasetRef, load_manifest, open_cache, open_split
from tasks.orchestration.cancellation import stop_if_cancelled
from tasks.orchestration.progress import progress, run_logger
from tasks.orchestration.step import step
from tasks.reporting.drawing import png
from tasks.reporting.markdown import Markup, plain, table

JSON, PAGE, SHEET = "data.json", "data.md", "data_samples.png"


class DataRefused(GateRefused):
    """The data are not fit to be trained on; nothing was trained."""


class DataReport(Record):
    """A published report on a dataset version."""

    dataset: DatasetRef
    checks: DataChecks

    prefix: str
    """Of its objects in the bucket, with a slash at the end."""


@step("data-gate")
def data_gate(
    dataset: DatasetRef,
    config: DataGateConfig,
    champion: str | None = None,
    *,
    oldest: str | None = None,
    images_for_margin: int = 0,
    warm_start: bool = False,
) -> DataReport:
    """Checks a dataset version, publishes what was found, and lets it pass or refuses it.

    Args:
        champion: dataset version that the champion learned from, if there is one; one that is not in the bucket any
            more is not compared with.
        oldest: likewise for the oldest champion that a rollback can reach.
        images_for_margin: test images that the quality gate needs to show its margin.
        warm_start: the training starts from the champion's weights.

    Raises:
        Cancelled: the flow run was cancelled.
        DataRefused: a check with the level `fail` did, or a warm start would be judged on images that the champion was
            trained on.
        ServiceError: the object store failed.
    """
    stop_if_cancelled()
    store = open_bucket()
    cache = open_cache(store)
    manifest = load_manifest(store, dataset.version)
    splits = {name: open_split(cache, manifest, name) for name in SPLITS}
    theirs = _champions(cache, manifest, splits["train"], champion)
    first = _champions(cache, manifest, splits["train"], oldest) if oldest != champion else None
    total = sum(map(len, splits.values()))
    total += sum(len(train) for other, train in filter(None, (theirs, first)) if other.version != dataset.version)
    with progress(f"Checking {dataset.name}", total, unit="images") as advance:
        checks = check_dataset(
            manifest, splits, config, theirs, advance, oldest=first, images_for_margin=images_for_margin
        )
    report = _publish(store, dataset, checks, png(contact_sheet(checks, splits)))
    for check in checks.with_outcome("warned"):
        run_logger().warning("%s: %s", dataset.name, _said(check))
    if failed := checks.with_outcome("failed"):
        raise DataRefused(
            f"dataset {dataset.name} is refused: {'; '.join(map(_said, failed))}; the report is "
            f"{store.uri(report.prefix + PAGE)}; mend the data, or change data_gate.{failed[0].name} or its limit"
        )
    learned = next(check for check in checks.checks if check.name == "trained_on")
    if warm_start and learned.outcome == "warned":
        raise DataRefused(
            f"a warm start on {dataset.name} is refused, since the champion has learned test images: {_said(learned)}; "
            "set warm_start=false, or raise data_gate.max_trained_on"
        )
    run_logger().info("the data of %s may be trained on: %s", dataset.name, _count(checks))
    return report


def log_data_report(run_id: str, report: DataReport) -> None:
    """Puts a report into an MLflow run: `report/data.json`, `data.md`, `data_samples.png`, a tag, and metrics
    of what changed against the champion's data. A resumed run keeps what was found when it began: it may itself be
    the champion by now.

    Raises:
        ServiceError: a server failed.
    """
    if DATA_GATE in mlflow_runs.run_tags(run_id):
        return
    store = open_bucket()
    with TemporaryDirectory() as temporary:
        for name in (JSON, PAGE, SHEET):
            file = Path(temporary) / name
            store.get_file(report.prefix + name, file)
            mlflow_runs.log_file(run_id, file, "report")
    if report.checks.champion_version:  # these change from run to run, and are worth a chart
        names = CHAMPION_CHECKS + SLOW_DRIFT_CHECKS
        compared = {check.name: check.value for check in report.checks.checks if check.name in names}
        mlflow_runs.log_metrics(
            run_id, {f"data/{name}": value for name, value in compared.items() if value is not None}
        )
    mlflow_runs.set_tags(run_id, {DATA_GATE: report.checks.outcome})


def data_markdown(name: str, checks: DataChecks) -> str:
    """What was found, as a page: the verdict, the checks, the worst first, the splits and the images complained of."""
    order = ("failed", "warned", "passed", "skipped", "off")
    verdict = {"passed": "passed", "warned": "passed with warnings", "failed": "refused"}[checks.outcome]
    found = sorted(checks.checks, key=lambda check: order.index(check.outcome))
    splits = (
        (split, of.images, of.duplicates, of.leaked, of.conflicts, of.constant, of.blank)
        for split, of in checks.splits.items()
    )
    counts = [facts.class_counts for facts in checks.splits.values()]
    lines = [
        f"**{plain(name)}: {verdict}** ({_count(checks)})",
        "",
        f"Dataset version `{checks.dataset_version}`, compared with "
        + (f"the champion's, `{checks.champion_version}`" if checks.champion_version else "none: no champion's data"),
        "",
        *table(("check", "result", "found", "limit", ""), map(_row, found), "llrrl"),
        "",
        *table(("split", "images", "repeated", "leaked", "conflicting", "constant", "blank"), splits, "lrrrrrr"),
        "",
        *table(("class", *checks.splits), zip(checks.classes, *counts, strict=True), "l" + "r" * len(counts)),
    ]
    if checks.offenders:
        marked = (
            (each.check, f"{each.split} {each.index}", checks.classes[each.label], each.note)
            for each in checks.offenders
        )
        lines += ["", *table(("check", "image", "class", ""), marked, "llll")]
    return "\n".join(lines)


def _champions(
    cache: Cache, manifest: Manifest, train: SplitReader, version: str | None
) -> tuple[Manifest, SplitReader] | None:
    """The manifest and training split of the champion's dataset version, if it is still there."""
    if version is None:
        return None
    if version == manifest.version:
        return manifest, train
    try:
        theirs = load_manifest(cache.store, version)
        return theirs, open_split(cache, theirs, "train")
    except (ObjectMissing, DatasetDamaged) as error:
        run_logger().warning("the data are not compared with the champion's: %s", error)
        return None


def _publish(store: ObjectStore, dataset: DatasetRef, checks: DataChecks, sheet: bytes) -> DataReport:
    data, page = checks.model_dump_json(indent=2).encode(), data_markdown(dataset.name, checks)
    prefix = bucket_layout.data_report(dataset.version, hashlib.sha256(data).hexdigest())
    store.put_bytes(prefix + SHEET, sheet)
    store.put_bytes(prefix + PAGE, page.encode())
    store.put_bytes(prefix + JSON, data)
    page += f"\n\nSamples of each class, and the images complained of: `{store.uri(prefix + SHEET)}`"
    create_markdown_artifact(page, key="data-gate", description=f"Data gate, dataset version {dataset.version}")
    return DataReport(dataset=dataset, checks=checks, prefix=prefix)


def _count(checks: DataChecks) -> str:
    outcomes = [check.outcome for check in checks.checks]
    return ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in sorted(set(outcomes)))


def _said(check: DataCheck) -> str:
    return f"{check.name} is {_number(check.value)}, limit {_number(check.limit)} ({check.note})"


def _row(check: DataCheck) -> tuple[str, ...]:
    mark = Markup(f"**{check.outcome}**") if check.outcome in ("failed", "warned") else check.outcome
    return check.name, mark, _number(check.value), _number(check.limit), check.note


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
