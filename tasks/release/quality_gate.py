"""The quality gate: compares a version with the champion on the same test split, and publishes the verdict.

The bucket holds each verdict as models/<name>/verdicts/<SHA-256>.json.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from prefect.artifacts import create_markdown_artifact
from pydantic import ValidationError
from torch import Tensor

from cnn.data.checks import pixel_digests
from cnn.data.manifest import Manifest
from cnn.data.split_reader import SplitReader
from cnn.evaluation.evaluate import eval_batch
from infra.errors import GateRefused, UsageError
from infra.machine.threads import in_parallel
from infra.storage import bucket_layout
from infra.storage.cache import Cache
from infra.storage.object_store import ObjectStore, open_bucket
from infra.storage.s3_client import ObjectMissing
from infra.tracking import mlflow_runs
from infra.tracking.model_registry import ModelVersion, RegisteredVersion, tag_version
from infra.tracking.model_versions import find_version
from infra.tracking.promotion_history import standing_champion
from infra.tracking.served_model import ServedModel
from infra.tracking.tags import NO_CHAMPION, VersionRecord
from tasks.config.gates import GateConfig
from tasks.config.key_values import explain
from tasks.data.dataset import DatasetDamaged, dataset_of, open_cache, open_split
from tasks.data.image_index import ImageIndex, index_digest, load_index, slice_masks
from tasks.evaluation.report import median_ms
from tasks.evaluation.split_predictions import load_predictions, store_predictions
from tasks.orchestration.cancellation import stop_if_cancelled
from tasks.orchestration.progress import progress, run_logger
from tasks.orchestration.step import step
from tasks.release.quality.checks import Scored
from tasks.release.quality.judge import judge
from tasks.release.quality.verdict import Verdict
from tasks.training.runs.run_record import read_record

WARM_UP_CALLS, TIMED_CALLS = 5, 30  # with one image


class QualityRefused(GateRefused):
    """The quality gate has refused the version; the verdict is published."""

    def __init__(self, verdict: Verdict) -> None:
        help_ = f"; what would help: {verdict.remedy}" if verdict.remedy else ""
        super().__init__(f"the quality gate {verdict.summary}{help_}")
        self.verdict = verdict


@step("quality-gate")
def quality_gate(registered: ModelVersion, config: GateConfig, *, slices: Sequence[str] | None = None) -> Verdict:
    """Judges a version against the present champion, on the test split of the version's own dataset.

    Whatever its outcome, the verdict goes to the bucket, to the version's MLflow run (`report/verdict.*`), to the
    version's tags (`convoy.verdict*`) and, as a page, to Prefect.

    Args:
        slices: see `compare`.

    Raises:
        Cancelled: the flow run was cancelled.
        QualityRefused: the version must not become champion.
        ServiceError: a server failed.
    """
    stop_if_cancelled()
    verdict = judge_version(registered, config, slices)
    publish(registered, verdict)
    create_markdown_artifact(verdict.markdown(), key="quality-gate", description=verdict.summary)
    if not verdict.passed:
        raise QualityRefused(verdict)
    run_logger().info("quality gate passed: %s", verdict.challenger)  # the command prints the rest at its end
    return verdict


def conditions_of(version: RegisteredVersion, changes: GateConfig) -> GateConfig:
    """Returns the conditions that a version's training was to meet, with changes.

    Args:
        changes: the keys that are set in it replace those of the training. Only they are used if its record is gone, or
            if another version of Convoy wrote it.

    Raises:
        UsageError: they contradict each other, or nothing is known.
    """
    try:
        own = read_record(version.run_id).config.gate
    except UsageError as error:
        if changes.model_fields_set:
            return changes
        raise UsageError(
            f"the conditions that {version.address} was to meet are not known: {error}; give them, such as "
            f"--set mode={changes.mode}: the others are then the defaults"
        ) from error
    values = own.model_dump(exclude_unset=True) | changes.model_dump(exclude_unset=True)
    try:
        return GateConfig.model_validate(values)
    except ValidationError as error:
        raise UsageError(explain(error, GateConfig, values)) from None


def judge_version(version: ModelVersion, config: GateConfig, slices: Sequence[str] | None = None) -> Verdict:
    """Returns the verdict on a version against the present champion of its name; publishes nothing.

    If the champion is missing in the registry, a note in the verdict names its substitute.
    """
    standing = standing_champion(open_bucket(), version.name)
    verdict = compare(version, standing.version, config, slices)
    if not standing.note:
        return verdict
    run_logger().warning("%s", standing.note)
    return verdict.model_copy(update={"notes": (*verdict.notes, standing.note)})


def compare(
    challenger: ModelVersion, champion: ModelVersion | None, config: GateConfig, slices: Sequence[str] | None = None
) -> Verdict:
    """Returns the verdict on a version against another or none, on the test split of the challenger's dataset.

    Args:
        slices: columns of metadata whose values must not get worse; None: those of the challenger's training.

    Raises:
        UsageError: there is no such version, or the bucket has lost the challenger's data.
        ServiceError: a server failed.
    """
    store = open_bucket()
    # A trial has a run and tags, but is not in the registry.
    found = challenger if isinstance(challenger, RegisteredVersion) else find_version(challenger.address)
    manifest = dataset_of(store, found)
    split = open_split(open_cache(store), manifest, "test")
    timed = config.max_latency_ms is not None
    against = find_version(champion.address) if champion else None
    test = test_digest(manifest)
    columns = _slices_of(found.run_id) if slices is None else tuple(slices)
    index = load_index(store, manifest.version) if columns else None
    learned, unknown = _only_champions(open_cache(store), manifest, split, against) if against else (None, "")
    opponent = _score_champion(store, against, manifest, split) if against else None
    verdict = judge(
        score(store, found, manifest, split, timed=timed),
        opponent,
        config,
        labels=split.labels.numpy(),
        classes=manifest.classes,
        slices=slice_masks(index, "test", columns) if index else None,
        dataset_version=manifest.version,
        test_sha256=test,
        learned=learned,
        judged_before=judged_before(store, found, test, manifest.version),
    )
    sha256 = index_digest(store, manifest.version, columns)
    notes = (*verdict.notes, *filter(None, [unknown]), *missing_columns(columns, index))
    failed = opponent is not None and opponent.failed
    about = {"slices": columns, "index_sha256": sha256, "notes": notes, "champion_failed": failed}
    return verdict.model_copy(update=about)


def missing_columns(columns: Sequence[str], index: ImageIndex | None) -> list[str]:
    """Returns a note on each column of metadata that the image index of the test split lacks."""
    return [
        f"the values of column {name} (data.slices) were not compared: the image index has no such column any more, "
        "since the same images were packed from a source without it; pack them from the label table again"
        for name in columns
        if index is None or name not in index.columns
    ]


def _slices_of(run_id: str) -> tuple[str, ...]:
    try:
        return read_record(run_id).config.data.slices
    except UsageError:
        return ()


def test_digest(manifest: Manifest) -> str:
    """Returns the digest of a test split; dataset versions with the same test images in the same order share it."""
    shards = " ".join(shard.sha256 for shard in manifest.splits["test"].shards)
    return hashlib.sha256(shards.encode()).hexdigest()


def judged_before(store: ObjectStore, version: RegisteredVersion, test_sha256: str, dataset_version: str) -> int:
    """Counts the other versions of a model that the same test split has judged, by the verdicts in the bucket."""
    keys = [info.key for info in store.list(bucket_layout.verdicts(version.name))]
    judged = set()
    for verdict in in_parallel(partial(store.read_record, kind=Verdict), keys):
        # Those of older code name only the dataset version. Damaged ones, and those of newer code, do not count.
        if verdict and (verdict.test_sha256 or verdict.dataset_version) in (test_sha256, dataset_version):
            judged.add(verdict.challenger)
    return len(judged - {version.address})


def _only_champions(
    cache: Cache, manifest: Manifest, split: SplitReader, champion: RegisteredVersion
) -> tuple[NDArray[np.bool_] | None, str]:
    """Returns a mask of the test images that only the champion was trained on, None if its data are equal or unknown.

    If they are unknown, the text says so.
    """
    version = champion.record.dataset_version
    if version == manifest.version:
        return None, ""
    try:
        learned = pixel_digests(open_split(cache, dataset_of(cache.store, champion), "train"))
    except (UsageError, ObjectMissing, DatasetDamaged) as error:
        return None, f"test images that the champion was trained on, if any, were not left out: {error}"
    test = pixel_digests(split)
    mask = np.isin(test, learned)
    if mask.any():  # images in both training splits favour neither version
        mask &= ~np.isin(test, pixel_digests(open_split(cache, manifest, "train")))
    return mask, ""


def publish(version: ModelVersion, verdict: Verdict) -> None:
    """Stores a verdict, and adds it to the version's run and tags. The tags are written last, as the commit."""
    store = open_bucket()
    store.put_bytes(bucket_layout.verdict(version.name, verdict.sha256), verdict.to_bytes())
    record = VersionRecord(
        verdict=verdict.outcome,
        verdict_summary=verdict.summary,
        verdict_champion=verdict.champion or NO_CHAMPION,
        verdict_sha256=verdict.sha256,
    )
    found = find_version(version.address)
    approval = found.record.model_copy(update={"verdict": record.verdict}).approval_sentence
    log_verdict(found.run_id, verdict, approval)
    tag_version(version, record.to_tags())


def log_verdict(run_id: str, verdict: Verdict, approval: str = "") -> None:
    """Writes a verdict into an MLflow run, as JSON and as a page."""
    mlflow_runs.log_text(run_id, "report/verdict.json", verdict.to_bytes().decode())
    mlflow_runs.log_text(run_id, "report/verdict.md", verdict.markdown(approval))


def _score_champion(store: ObjectStore, version: RegisteredVersion, manifest: Manifest, split: SplitReader) -> Scored:
    """Scores the champion. One that cannot be loaded is an obstacle, which the verdict states; it ends no training."""
    try:
        return score(store, version, manifest, split)
    except UsageError as error:
        return replace(_not_comparable(version, split, str(error)), failed=True)


def _not_comparable(version: RegisteredVersion, split: SplitReader, why: str) -> Scored:
    return Scored(
        address=version.address,
        correct=np.zeros(len(split), dtype=np.bool_),
        obstacle=f"{why}: it cannot be compared",
    )


def score(
    store: ObjectStore, version: RegisteredVersion, manifest: Manifest, split: SplitReader, *, timed: bool = False
) -> Scored:
    """Scores a version on the test split, with its stored predictions if they are for this split.

    Classes are compared by name, so a champion can have other classes, or the same in another order.

    Args:
        manifest: of the split's dataset version.
        timed: measure the latency too, which loads the model.
    """
    model = ServedModel(version)
    weights = version.record.weights_sha256 or ""
    found = load_predictions(store, version.run_id, manifest, weights)
    if found is None:
        if takes := _other_images(model, manifest, split):
            return _not_comparable(version, split, f"{version.address} {takes}")
        found = _predict(model, split), model.classes
        store_predictions(store, version.run_id, found[0], found[1], manifest, weights)
    predicted, classes = found
    label_of = {name: label for label, name in enumerate(manifest.classes)}
    labels = torch.tensor([label_of.get(name, -1) for name in classes])
    info = store.head(version.record.weights_key) if version.record.weights_key else None
    image = split.slice(0, 1)[0].numpy()
    answers = labels[predicted]
    return Scored(
        address=version.address,
        correct=(answers == split.labels).numpy(),
        predicted=answers.numpy(),
        unknown=frozenset(label_of.values()) - frozenset(labels.tolist()),
        size_bytes=info.size if info else None,
        latency_ms=median_ms(lambda: model.predict(image), warm_up=WARM_UP_CALLS, timed=TIMED_CALLS) if timed else None,
    )


def _other_images(model: ServedModel, manifest: Manifest, split: SplitReader) -> str:
    """Says how the images that a model is made for differ from those of a split; empty if they do not."""
    if model.shape != split.shape:
        takes, given = ("×".join(map(str, shape)) for shape in (model.shape, split.shape))
        return f"takes {takes} images, but those of the test split are {given}"
    if model.resize != manifest.resize:  # it would be judged by images that it never gets where it is served
        return f"makes images square by {model.resize}, but those of the test split are made so by {manifest.resize}"
    return ""


def _predict(model: ServedModel, split: SplitReader) -> Tensor:
    """Returns the most probable class of each image, int64 [N]."""
    parts = []
    with progress(f"Scoring {model.version.address}", len(split), unit="images") as advance:
        for images, _ in split.blocks(eval_batch(split)):
            parts.append(torch.from_numpy(model.predict(images.numpy())).argmax(1))
            advance(len(images))
    return torch.cat(parts)
