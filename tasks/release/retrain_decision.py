"""Decides whether to retrain: compares the inputs of a training with those of the champion."""

from collections.abc import Mapping
from typing import Any

from infra.errors import UsageError
from infra.records import Record
from infra.storage.object_store import ObjectStore, open_bucket
from infra.tracking.model_registry import ModelVersion, RegisteredVersion, search_versions
from infra.tracking.promotion_history import Standing
from infra.tracking.provenance import provenance
from tasks.config.run import RunConfig
from tasks.data.dataset import DatasetRef
from tasks.orchestration.cancellation import stop_if_cancelled
from tasks.orchestration.progress import run_logger
from tasks.orchestration.step import step
from tasks.release.promote import repaired_champion, verdict_on
from tasks.training.runs.run_record import flatten, read_record
from tasks.training.runs.tracked_run import run_manifest

INPUTS = {
    "dataset_version": "data",
    "code_digest": "code",
    "digest_format": "Convoy, which records code in another way now",
    "lock_sha256": "lock file",
}
"""Keys of a run's manifest that are inputs, with their names in messages; all keys below `config` are inputs too. The
other keys describe the machine: another worker is no reason to train again."""


class Decision(Record):
    """Whether to train, and why."""

    train: bool
    why: str
    """One line."""

    champion_weights: str | None
    """Address of the champion's weights."""

    judge: ModelVersion | None = None
    """A version to judge again instead of training: it has the same inputs, but was refused by other conditions of the
    quality gate than the present ones."""


@step("what-changed")
def what_changed(name: str, config: RunConfig, dataset: DatasetRef, *, force: bool = False) -> Decision:
    """Compares the inputs of a training with those of the champion.

    Also decides against a training if a version with equal inputs was refused against this champion: an exact training
    would give the same weights and, under the same conditions of the gate, the same verdict.

    Args:
        name: of the model.
        config: of the training, without weights to start from.
        force: train whatever has changed.

    Raises:
        ServiceError: a server failed.
    """
    stop_if_cancelled()
    store = open_bucket()
    standing = repaired_champion(store, name)
    champion = standing.version
    train, why, judge = _decide(store, config, dataset, standing, force=force)
    run_logger().info("%s: %s", name, why)
    key = champion.record.weights_key if champion else None
    return Decision(
        train=train,
        why=why,
        champion_weights=store.uri(key) if key else None,
        judge=judge,
    )


def _decide(
    store: ObjectStore, config: RunConfig, dataset: DatasetRef, standing: Standing, *, force: bool
) -> tuple[bool, str, ModelVersion | None]:
    """Returns whether to train, why, and which version to judge instead."""
    champion = standing.version
    if champion is None:
        return True, standing.note or "there is no champion yet", None
    now = _inputs(run_manifest(config, dataset, provenance()).model_dump(), config)
    before = _inputs_of(champion, config)
    if before is None:
        return True, f"the inputs of the champion, version {champion.version}, are unknown", None
    differing = [key for key in sorted(now.keys() | before.keys()) if now.get(key) != before.get(key)]
    if "digest_format" in differing:  # then digests of the same code differ
        differing.remove("code_digest")
    changed = "; ".join(
        INPUTS.get(key) or f"{key.removeprefix('config.')} was {before.get(key)}, is {now.get(key)}"
        for key in differing
    )
    if force:
        return True, f"training was forced; {'changed: ' + changed if changed else 'nothing has changed'}", None
    if not differing:
        return False, f"nothing has changed since the champion, version {champion.version}", None
    for version in search_versions(name=champion.name):
        refused = version.record.verdict == "refused" and version.record.verdict_champion == champion.address
        if refused and _inputs_of(version, config) == now:
            why = f"version {version.version}, with the same inputs, was refused against version {champion.version}"
            verdict = verdict_on(store, version)
            if verdict and verdict.config == config.gate:
                return False, why, None
            return False, f"{why} by other conditions than the present ones, so it is judged again", version
    return True, f"changed since the champion, version {champion.version}: {changed}", None


def _inputs_of(version: RegisteredVersion, config: RunConfig) -> dict[str, Any] | None:
    """Returns the inputs of a version; None if its run has no readable record."""
    try:
        return _inputs(read_record(version.run_id).manifest.model_dump(), config)
    except UsageError:
        return None


def _inputs(manifest: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """Returns a manifest's inputs, flat. A warm start's weights do not count: they are the last champion's."""
    inputs = {key: manifest[key] for key in INPUTS} | flatten({"config": manifest["config"]})
    if config.warm_start:
        inputs.pop("config.pretrained_sha256", None)
    return inputs
