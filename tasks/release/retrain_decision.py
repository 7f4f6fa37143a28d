"""Decides whether to retrain: compares the inputs of a training with those of the champion."""

from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from typing import Any

from prefect.client.schemas.objects import StateType
from pydantic import Field

from infra.errors import UsageError
from infra.records import Record
from infra.storage.object_store import ObjectStore, open_bucket
from infra.storage.s3_client import ObjectMissing
from infra.tracking import mlflow_runs
from infra.tracking.model_registry import ModelVersion, RegisteredVersion, search_versions
from infra.tracking.promotion_history import Standing
from infra.tracking.tags import EXPIRED, FLOW_RUN, NO_CHAMPION, REFUSED, WAITING
from tasks.config.run import RunConfig
from tasks.data.dataset import DatasetDamaged, DatasetRef, load_manifest
from tasks.data.image_index import index_digest
from tasks.orchestration.cancellation import stop_if_cancelled
from tasks.orchestration.flow_runs import flow_run_id, page_of, read_flow_run
from tasks.orchestration.progress import run_logger
from tasks.orchestration.step import step
from tasks.release.promote import repaired_champion, verdict_on
from tasks.training.platform import flatten
from tasks.training.runs.run_record import config_inputs, inputs_of, read_record

DATA = "dataset_version"
INPUTS = {
    DATA: "data",
    "code_digest": "code",
    "digest_format": "Convoy, which records code in another way now",
    "lock_sha256": "lock file",
}
"""Keys of a run's manifest that are inputs, with their names in messages; all keys below `config` are inputs too. The
other keys describe the machine: another worker is no reason to train again."""

FILES = "network_files."
"""Prefix of keys of a run's manifest: files of a network of one's own. They are part of the digest of the code."""

NORMALISATION = ("pretrained_mean", "pretrained_std")
"""Keys of the configuration that belong to the weights to start from."""

BEFORE_DECISION = (StateType.RUNNING, StateType.PAUSED)
"""States of a flow run that waits for a person, is about to, or is acting on the answer."""


class Decision(Record):
    """Whether to train, and why."""

    train: bool
    why: str
    """One line."""

    champion_weights: str | None
    """Address of the champion's weights."""

    champion_normalisation: dict[str, tuple[float, ...] | None] = Field(default_factory=dict)
    """Keys of the configuration by which the champion's images were normalised; empty if they are unknown."""

    judge: ModelVersion | None = None
    """A version to judge again instead of training: it has the same inputs, but was refused by other conditions of the
    quality gate than the present ones, or a person has to be asked about it again."""


@step("what-changed")
def what_changed(name: str, config: RunConfig, dataset: DatasetRef, *, force: bool = False) -> Decision:
    """Compares the inputs of a training with those of the champion.

    Also decides against a training if a version with equal inputs was judged against this champion: an exact training
    would give the same weights and, under the same conditions of the gate, the same verdict. So does a version with
    equal inputs that was rolled back, that a person has refused against this champion, or that waits for a person.

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
    train, why, judge = _decide(store, name, config, dataset, standing, force=force)
    run_logger().info("%s: %s", name, why)
    key = champion.record.weights_key if champion else None
    return Decision(
        train=train,
        why=why,
        champion_weights=store.uri(key) if key else None,
        champion_normalisation=_normalisation_of(champion) if champion else {},
        judge=judge,
    )


def _normalisation_of(version: RegisteredVersion) -> dict[str, tuple[float, ...] | None]:
    try:
        config = read_record(version.run_id).config
    except UsageError:
        return {}
    return {key: getattr(config, key) for key in NORMALISATION}


def _decide(
    store: ObjectStore, name: str, config: RunConfig, dataset: DatasetRef, standing: Standing, *, force: bool
) -> tuple[bool, str, ModelVersion | None]:
    """Returns whether to train, why, and which version to judge instead."""
    champion = standing.version
    now = _inputs(inputs_of(config, dataset), config)
    if not force and (undecided := _undecided(name, config, champion, now)):
        return undecided
    before = _inputs_of(champion, config, now) if champion else None
    changed = _changed(before, now) if before is not None else ""
    if not force:
        if champion and before is not None and not changed:
            return False, f"nothing has changed since the champion, version {champion.version}", None
        if known := _known(store, name, config, dataset, standing, now):
            return known
    if champion is None:
        return True, standing.note or "there is no champion yet", None
    if force:
        return True, f"training was forced; {'changed: ' + changed if changed else 'nothing has changed'}", None
    if before is None:
        return True, f"the inputs of the champion, version {champion.version}, are unknown", None
    return True, f"changed since the champion, version {champion.version}: {changed}", None


@lru_cache(maxsize=2)  # the present ones, and those of the version that is looked at
def _images(version: str) -> dict[str, Any]:
    return load_manifest(open_bucket(), version).model_dump(exclude={"report"})


def _same_images(version: str, other: str) -> bool:
    try:
        return version == other or _images(version) == _images(other)
    except (ObjectMissing, DatasetDamaged):
        return False


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Names the inputs that differ; empty if none does."""
    differing = [key for key in sorted(now.keys() | before.keys()) if now.get(key) != before.get(key)]
    if "digest_format" in differing:  # then digests of the same code differ
        differing.remove("code_digest")
    files = ", ".join(key.removeprefix(FILES) for key in differing if key.startswith(FILES))
    names = INPUTS | ({"code_digest": f"{INPUTS['code_digest']} ({files})"} if files else {})
    return "; ".join(
        names.get(key) or f"{key.removeprefix('config.')} was {before.get(key)}, is {now.get(key)}"
        for key in differing
        if not key.startswith(FILES)
    )


def _known(
    store: ObjectStore, name: str, config: RunConfig, dataset: DatasetRef, standing: Standing, now: Mapping[str, Any]
) -> tuple[bool, str, ModelVersion | None] | None:
    """Returns the decision against a training that would only repeat a version on which the verdict is known."""
    champion = standing.version
    present = champion.address if champion else NO_CHAMPION
    against = f"against version {champion.version}" if champion else "when there was no champion either"
    changes = list(pairwise(standing.entries))  # from each champion to the next
    for version in search_versions(name=name):
        record, why = version.record, f"version {version.version}, with the same inputs,"
        gates = record.verdict == "refused" or (record.verdict == "passed" and not record.approval)
        judged = gates and record.verdict_champion == present
        left = (after for before, after in reversed(changes) if before.is_of(version.version, version.run_id))
        change = next(left, None)
        given_up = change if change and (change.action == "rollback" or judged) else None
        if version.address == present or not (given_up or judged) or _inputs_of(version, config, now) != now:
            continue
        if given_up:
            return False, f"{why} was champion until version {given_up.to_version} was restored; --force trains", None
        if record.verdict == "passed":
            if config.promotes:
                return False, f"{why} passed {against}, so it is judged again in place of a training", version
            return False, f"{why} passed {against}; `convoy promote {name} {version.version}` makes it champion", None
        why = f"{why} was refused {against}"
        verdict = verdict_on(store, version)
        slices = config.data.slices, index_digest(store, dataset.version, config.data.slices)
        if verdict and verdict.champion_failed:
            return False, f"{why}, which could not be loaded, so it is judged again", version
        if verdict and verdict.config == config.gate and (verdict.slices, verdict.index_sha256) == slices:
            return False, why, None
        return False, f"{why} by other conditions than the present ones, so it is judged again", version
    return None


def _undecided(
    name: str, config: RunConfig, champion: RegisteredVersion | None, now: Mapping[str, Any]
) -> tuple[bool, str, ModelVersion | None] | None:
    """Returns the decision against a training whose result a person has refused already, or has to decide about."""
    present = champion.address if champion else NO_CHAMPION
    for version in search_versions(name=name) if config.approval else ():
        record = version.record
        if record.verdict != "passed" or record.approval not in (WAITING, EXPIRED, REFUSED):
            continue
        other = record.approval != WAITING and record.verdict_champion != present  # of another champion's time
        if other or _inputs_of(version, config, now) != now:
            continue
        why = f"version {version.version}, with the same inputs: {record.approval_sentence}"
        if record.approval == REFUSED:
            return False, why, None
        flow_run = read_flow_run(mlflow_runs.run_tags(version.run_id).get(FLOW_RUN, ""))
        elsewhere = flow_run if flow_run and flow_run.id != flow_run_id() else None  # not if this one is tried again
        if record.approval == WAITING and elsewhere and elsewhere.state_type in BEFORE_DECISION:
            return False, f"{why}, at {page_of(elsewhere.id)}", None
        return False, f"{why}, so it is judged and a person is asked again", version
    return None


def _inputs_of(version: RegisteredVersion, config: RunConfig, now: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the inputs of a version; None if its run has no readable record.

    A dataset version that differs from the present one in its report only, as by a text file, counts as the same.
    """
    try:
        record = read_record(version.run_id)
    except UsageError:
        return None
    # Keys that are newer than the version have their defaults here, which do what the code before them did.
    inputs = _inputs({**record.manifest.model_dump(), "config": config_inputs(record.config)}, config)
    return {**inputs, DATA: now[DATA]} if _same_images(inputs[DATA], now[DATA]) else inputs


def _inputs(manifest: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """Returns a manifest's inputs, flat. A warm start's weights do not count: they are the last champion's."""
    inputs = {key: manifest[key] for key in INPUTS} | flatten(
        {"config": manifest["config"], FILES.rstrip("."): manifest.get(FILES.rstrip("."), {})}
    )
    if config.warm_start and not config.pretrained:
        for key in ("pretrained_sha256", *NORMALISATION):
            inputs.pop(f"config.{key}", None)
    return inputs
