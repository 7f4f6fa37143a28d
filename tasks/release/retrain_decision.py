"""Whether there is something to retrain for: the inputs of a training against those of the champion's."""

from collections.abc import Iterable, Mapping
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
"""Keys of a run's manifest that are inputs, with their names for people; so is all below `config`. The rest says what
machine it was: another worker is no reason to train again."""


class Decision(Record):
    """Whether to train."""

    train: bool
    why: str
    """In a line."""

    champion: str | None
    """`name/version`."""

    champion_weights: str | None
    """Address of the champion's weights."""

    judge: ModelVersion | None = None
    """A version that a training would only give again. It was refused by other conditions of the gate than the present
    ones, so it is to be judged by these."""


@step("what-changed")
def what_changed(name: str, config: RunConfig, dataset: DatasetRef, *, force: bool = False) -> Decision:
    """Compares what a training would rest on with what the champion rests on.

    There is nothing to do either if a version of the very same inputs was refused in favour of this champion: an exact
    training would give the same weights, and under the same conditions of the gate the same verdict.

    Args:
        name: of the model.
        config: as it will be trained with, but for weights to start from.
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
        champion=champion.address if champion else None,
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
    ours = _inputs(run_manifest(config, dataset, provenance()).model_dump(), config)
    theirs = _inputs_of(champion, config)
    if theirs is None:
        return True, f"what the champion, version {champion.version}, was made of is not known", None
    differing = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
    if "digest_format" in differing:  # then digests of the same code differ
        differing.remove("code_digest")
    changed = "; ".join(_said(key, theirs.get(key), ours.get(key)) for key in differing)
    if force:
        return True, f"it was asked for; {'changed: ' + changed if changed else 'nothing has changed'}", None
    if not differing:
        return False, f"nothing has changed since the champion, version {champion.version}", None
    for version in _refused_for(champion):
        if _inputs_of(version, config) == ours:
            why = f"version {version.version}, made of the same, was refused for version {champion.version}"
            verdict = verdict_on(store, version)
            if verdict and verdict.config == config.gate:
                return False, why, None
            return False, f"{why} by other conditions than the present ones, so it is judged again", version
    return True, f"changed since the champion, version {champion.version}: {changed}", None


def _refused_for(champion: RegisteredVersion) -> Iterable[RegisteredVersion]:
    for version in search_versions(name=champion.name):
        if version.record.verdict == "refused" and version.record.verdict_champion == champion.address:
            yield version


def _inputs_of(version: RegisteredVersion, config: RunConfig) -> dict[str, Any] | None:
    """None if its run has left no record that we can read."""
    try:
        return _inputs(read_record(version.run_id).manifest.model_dump(), config)
    except UsageError:
        return None


def _inputs(manifest: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """The part of a manifest that people change, flat; a warm start is from the last champion, whatever that is."""
    inputs = {key: manifest[key] for key in INPUTS} | flatten({"config": manifest["config"]})
    if config.warm_start:
        inputs.pop("config.pretrained_sha256", None)
    return inputs


def _said(key: str, was: Any, now: Any) -> str:
    return INPUTS[key] if key in INPUTS else f"{key.removeprefix('config.')} was {was}, is {now}"
