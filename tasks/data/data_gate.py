"""The data gate: checks a dataset version before a training uses it, and publishes a report.

The report is stored in the bucket, since refused data have no MLflow run:
reports/data/<dataset version>/<digest of the report>/{data.json,data.md,data_samples.png}
"""

import hashlib
from collections.abc import Mapping

from prefect.artifacts import create_markdown_artifact

from cnn.config.data_checks import DataGateConfig
from cnn.data.checks import CHAMPION_CHECKS, SLOW_DRIFT_CHECKS, DataCheck, DataChecks, check_dataset
from cnn.data.manifest import Manifest
from cnn.data.split_reader import SplitReader
from cnn.data.splits import SPLITS, Split
from infra.errors import GateRefused, Outage, ServiceError
from infra.records import Record
from infra.storage import bucket_layout
from infra.storage.cache import Cache
from infra.storage.object_store import ObjectStore, open_bucket
from infra.storage.s3_client import ObjectMissing
from infra.tracking import mlflow_runs
from infra.tracking.tags import DATA_GATE
from tasks.data.dataset import DatasetDamaged, DatasetRef, load_manifest, open_cache, open_split
from tasks.data.dataset_diff import Change, differences, summary
from tasks.data.image_index import ImageIndex, load_index
from tasks.orchestration.cancellation import stop_if_cancelled
from tasks.orchestration.progress import progress, run_logger
from tasks.orchestration.step import step
from tasks.reporting.drawing import png
from tasks.reporting.markdown import Markup, plain, table

ORDER = ("failed", "warned", "passed", "skipped", "off")
SHOWN_AS = {"skipped": "not tested", "off": "switched off"}  # on pages and in messages

LISTED_CHANGES = 20

JSON, PAGE, SHEET = "data.json", "data.md", "data_samples.png"


class DataRefused(GateRefused):
    """The data gate refused the data; nothing was trained."""


class DataReport(Record):
    """A published report on a dataset version."""

    dataset: DatasetRef
    checks: DataChecks

    prefix: str
    """Prefix of its objects in the bucket, with a slash at the end."""


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
    """Checks a dataset version, publishes a report, and passes or refuses the version.

    Args:
        champion: dataset version of the champion, if there is one; it is not compared if the bucket has lost it.
        oldest: dataset version of the oldest champion that a rollback can restore.
        images_for_margin: test images that the quality gate needs to show its margin.
        warm_start: the training starts from the champion's weights.

    Raises:
        Cancelled: the flow run was cancelled.
        DataRefused: a check of level `fail` failed, or a warm start would be judged on images that the champion was
            trained on.
        ServiceError: the object store failed.
    """
    stop_if_cancelled()
    store = open_bucket()
    cache = open_cache(store)
    manifest = load_manifest(store, dataset.version)
    splits = {name: open_split(cache, manifest, name) for name in SPLITS}
    index = load_index(store, dataset.version)
    present = _champion_split(cache, manifest, splits["train"], champion)
    first = _champion_split(cache, manifest, splits["train"], oldest) if oldest != champion else None
    total = sum(map(len, splits.values()))
    total += sum(len(train) for other, train in filter(None, (present, first)) if other.version != dataset.version)
    with progress(f"Checking {dataset.name}", total, unit="images") as advance:
        checks = check_dataset(
            manifest,
            splits,
            config,
            present,
            advance,
            oldest=first,
            images_for_margin=images_for_margin,
            groups={split: index.groups(split) for split in SPLITS} if index else None,
        )
    # Where these keys are not set, one image of another size or mode may change them.
    if present and (now := _shape(manifest)) != (before := _shape(present[0])):
        lost = "unless you set these keys to the champion's values, the quality gate cannot compare the two"
        run_logger().warning("the data of %s have %s, those of the champion %s; %s", dataset.name, now, before, lost)
    if index:
        checks = _with_paths(checks, index)
    changes = _changes(store, index, champion) if champion != dataset.version else None
    report = _publish(store, dataset, checks, changes, splits)
    for check in checks.with_outcome("warned"):
        run_logger().warning("%s: %s", dataset.name, _describe(check))
    if failed := checks.with_outcome("failed"):
        raise DataRefused(
            f"dataset {dataset.name} is refused: {'; '.join(map(_describe, failed))}; the report is "
            f"{store.uri(report.prefix + PAGE)}; fix the data, or change data_gate.{failed[0].name} or its limit"
        )
    trained_on = next(check for check in checks.checks if check.name == "trained_on")
    if warm_start and trained_on.outcome == "warned":
        raise DataRefused(
            f"a warm start on {dataset.name} is refused, since the champion was trained on test images: "
            f"{_describe(trained_on)}; set warm_start=false, or raise data_gate.max_trained_on"
        )
    run_logger().info("the data of %s may be trained on: %s", dataset.name, outcome_counts(checks))
    return report


def _shape(manifest: Manifest) -> str:
    return f"data.image_size={manifest.image_size} data.channels={manifest.channels} data.resize={manifest.resize}"


def _with_paths(checks: DataChecks, index: ImageIndex) -> DataChecks:
    """Adds the files of the images that fail a check."""
    paths = {split: index.paths(split) for split in {each.split for each in checks.offenders}}
    named = (each.model_copy(update={"path": paths[each.split][each.index] or ""}) for each in checks.offenders)
    return checks.model_copy(update={"offenders": tuple(named)})


def _changes(store: ObjectStore, index: ImageIndex | None, champion: str | None) -> list[Change] | None:
    """Returns the changes since the champion's data; None if there are none, or one of both has no index."""
    try:
        before = load_index(store, champion) if champion and index else None
    except Outage:
        raise
    except ServiceError as error:
        run_logger().warning("the changes since the champion's data are not listed: %s", error)
        return None
    return differences(before, index) if before and index else None


def log_data_report(run_id: str, report: DataReport) -> None:
    """Puts a report into an MLflow run: `report/data.json`, `data.md`, `data_samples.png`, a tag, and metrics of
    changes since the champion's data. A resumed run keeps its first report: its version may be the champion by now.

    Raises:
        ServiceError: a server failed.
    """
    if DATA_GATE in mlflow_runs.run_tags(run_id):
        return
    store = open_bucket()
    for name in (JSON, PAGE, SHEET):
        with store.fetched(report.prefix + name) as file:
            mlflow_runs.log_file(run_id, file, "report")
    if report.checks.champion_version:  # these values differ between runs, so that a chart shows something
        names = CHAMPION_CHECKS + SLOW_DRIFT_CHECKS
        compared = (check for check in report.checks.checks if check.name in names)
        mlflow_runs.log_metrics(
            run_id, {f"data/{check.name}": check.value for check in compared if check.value is not None}
        )
    mlflow_runs.set_tags(run_id, {DATA_GATE: report.checks.outcome})


def _markdown(name: str, checks: DataChecks, changes: list[Change] | None) -> str:
    """Returns a page with the verdict, the checks (the worst first), the splits and the images that fail a check."""
    verdict = {"passed": "passed", "warned": "passed with warnings", "failed": "refused"}[checks.outcome]
    found = sorted(checks.checks, key=lambda check: ORDER.index(check.outcome))
    splits = (
        (split, of.images, of.duplicates, of.leaked, of.conflicts, of.constant, of.blank)
        for split, of in checks.splits.items()
    )
    counts = [facts.class_counts for facts in checks.splits.values()]
    lines = [
        f"**{plain(name)}: {verdict}** ({outcome_counts(checks)})",
        "",
        f"Dataset version `{checks.dataset_version}`, compared with "
        + (f"the champion's, `{checks.champion_version}`" if checks.champion_version else "none: no champion's data"),
        *(["", f"Images since the champion's data: {summary(changes)}"] if changes is not None else []),
        "",
        *table(("check", "result", "found", "limit", ""), map(_row, found), "llrrl"),
        "",
        *table(("split", "images", "repeated", "leaked", "conflicting", "constant", "blank"), splits, "lrrrrrr"),
        "",
        *table(("class", *checks.splits), zip(checks.classes, *counts, strict=True), "l" + "r" * len(counts)),
    ]
    if changes:
        shown = changes[:LISTED_CHANGES]
        lines += ["", *table(("change", "image", "earlier", "later"), shown, "llll")]
        if len(shown) < len(changes):
            lines += ["", f"These are {len(shown)} of {len(changes):,} changes; `convoy data diff` writes all."]
    if checks.offenders:
        marked = (
            (each.check, each.path or f"{each.split} {each.index}", checks.classes[each.label], each.note)
            for each in checks.offenders
        )
        lines += ["", *table(("check", "image", "class", ""), marked, "llll")]
    return "\n".join(lines)


def _champion_split(
    cache: Cache, manifest: Manifest, train: SplitReader, version: str | None
) -> tuple[Manifest, SplitReader] | None:
    """Returns the manifest and training split of a champion's dataset version, if the bucket still has it."""
    if version is None:
        return None
    if version == manifest.version:
        return manifest, train
    try:
        found = load_manifest(cache.store, version)
        return found, open_split(cache, found, "train")
    except (ObjectMissing, DatasetDamaged) as error:
        run_logger().warning("the data are not compared with the champion's: %s", error)
        return None


def _publish(
    store: ObjectStore,
    dataset: DatasetRef,
    checks: DataChecks,
    changes: list[Change] | None,
    splits: Mapping[Split, SplitReader],
) -> DataReport:
    data, page = checks.model_dump_json(indent=2).encode(), _markdown(dataset.name, checks, changes)
    prefix = bucket_layout.data_report(dataset.version, hashlib.sha256(data).hexdigest())
    if store.head(prefix + SHEET) is None:  # equal checks of equal data have equal pictures
        from tasks.data.contact_sheet import contact_sheet  # loads matplotlib

        store.put_bytes(prefix + SHEET, png(contact_sheet(checks, splits)))
    store.put_bytes(prefix + PAGE, page.encode())
    store.put_bytes(prefix + JSON, data)
    page += f"\n\nSamples of each class, and the images that fail a check: `{store.uri(prefix + SHEET)}`"
    create_markdown_artifact(
        page, key="data-gate", description=f"Data gate of {dataset.name}, dataset version {dataset.version}"
    )
    return DataReport(dataset=dataset, checks=checks, prefix=prefix)


def outcome_counts(checks: DataChecks) -> str:
    """Returns how many checks had each outcome, the worst first."""
    outcomes = [check.outcome for check in checks.checks]
    return ", ".join(f"{outcomes.count(each)} {SHOWN_AS.get(each, each)}" for each in ORDER if each in outcomes)


def _describe(check: DataCheck) -> str:
    return f"{check.name} is {_number(check.value)}, limit {_number(check.limit)} ({check.note})"


def _row(check: DataCheck) -> tuple[str, ...]:
    mark = SHOWN_AS.get(check.outcome, check.outcome)
    if check.outcome in ("failed", "warned"):
        mark = Markup(f"**{mark}**")
    return check.name, mark, _number(check.value), _number(check.limit), check.note


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
