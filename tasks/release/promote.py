"""Promotes a version to champion, if its gates passed it against the present champion.

Importing this module loads neither torch nor Prefect.
"""

import hashlib
from itertools import dropwhile
from typing import NamedTuple

from pydantic import ValidationError

from infra.errors import GateRefused
from infra.storage import bucket_layout
from infra.storage.object_store import ObjectStore, open_bucket
from infra.storage.s3_client import ObjectMissing
from infra.tracking import mlflow_runs
from infra.tracking.model_registry import ModelVersion, RegisteredVersion, search_versions, tag_version
from infra.tracking.model_versions import find_version
from infra.tracking.promotion_history import (
    Promotion,
    Standing,
    history,
    promote,
    registered_champions,
    repair_aliases,
    standing_champion,
)
from infra.tracking.tags import APPROVED, EXPIRED, REFUSED, RESULT, VERDICT, WAITING, decision
from tasks.config.gates import check_override
from tasks.release.quality.verdict import Verdict
from tasks.training.runs.lineage import version_lineage


class PromotionRefused(GateRefused):
    """A gate has not passed the version; nothing was changed."""


class ChampionChanged(PromotionRefused):
    """The quality gate has passed the version against another champion than the present one; nothing was changed."""


class ChampionData(NamedTuple):
    """Dataset versions that a model's champions were trained on; None if there is no champion or no record of it."""

    present: str | None
    oldest: str | None
    """Dataset version of the oldest champion that a rollback can restore."""


def champion_data(name: str) -> ChampionData:
    """Repairs a model's aliases, and returns the dataset versions of its champions.

    Raises:
        UsageError: invalid name.
        ServiceError: a server failed.
    """
    standing = repaired_champion(open_bucket(create=True), name)
    if standing.version is None:
        return ChampionData(None, None)
    reachable = registered_champions(standing.entries, search_versions(name=name))
    known = (version.record.dataset_version for version in reachable)
    return ChampionData(standing.version.record.dataset_version, next(filter(None, known), None))


def repaired_champion(store: ObjectStore, name: str) -> Standing:
    """Repairs a model's aliases, logs a warning per repair, and returns the champion. Every training starts with it.

    Raises:
        UsageError: invalid name.
        ServiceError: a server failed.
    """
    from tasks.orchestration.progress import run_logger  # loads Prefect, which the commands do not need

    for change in repair_aliases(store, name):
        run_logger().warning("alias of %s repaired from its history: %s", name, change)
    standing = standing_champion(store, name)
    if standing.note:
        run_logger().warning("%s", standing.note)
    return standing


def promotions_of(version: ModelVersion) -> list[Promotion]:
    """Returns the history from this version's promotion on, and repairs the aliases; empty if it was never promoted.

    Raises:
        ServiceError: a server failed.
    """
    store = open_bucket()
    entries = list(dropwhile(lambda each: each.to_version != version.version, history(store, version.name)))
    if entries:
        run_id = find_version(version.address).run_id
        entries = list(dropwhile(lambda each: not each.is_of(version.version, run_id), entries))
    if entries:
        repair_aliases(store, version.name)
    return entries


def promote_version(
    version: ModelVersion, *, force: bool = False, reason: str = "", approved_by: str = ""
) -> Promotion:
    """Makes a version the champion, if it passed the serving gate, and the quality gate against the present champion.

    Args:
        force: promote it whatever the gates decided; needs a reason.
        approved_by: name of the person who approved it in Prefect.

    Raises:
        UsageError: there is no such version, or no reason was given.
        AlreadyChampion: the version is the champion.
        ChampionChanged: the quality gate passed it against another champion than the present one.
        PromotionRefused: a gate has not passed it.
        PromotionLost: another promotion came first.
        ServiceError: a server failed.
    """
    check_override(force, reason)
    store = open_bucket(create=True)
    # Every decision below rests on this state: a promotion in between makes this one lose.
    standing = standing_champion(store, version.name)
    last = standing.last
    found = find_version(version.address)
    verdict = verdict_on(store, found)
    is_champion = last is not None and last.is_of(found.version, found.run_id)  # `promote` raises for it
    objection = None if is_champion else _objection(found, verdict, standing)
    if objection and not force:
        kind = ChampionChanged if objection.champion_changed else PromotionRefused
        raise kind(f"{found.address} is not promoted: {objection.why}")
    promotion = promote(
        store,
        found,
        after=last,
        lineage=version_lineage(store, found),
        reason=reason,
        approved_by=approved_by,
        forced=objection is not None,
        verdict_sha256=found.record.verdict_sha256 if verdict else None,  # older code may have written its bytes
        verdict_summary=verdict.summary if verdict else "",
    )
    if found.record.approval in (WAITING, REFUSED, EXPIRED):  # a promotion by hand is a later decision
        made = decision(APPROVED, approved_by or promotion.who, reason)
        record = found.record.model_copy(update=made.model_dump(exclude_none=True))
        tag_version(found, {**made.to_tags(), RESULT: record.headline})
        mlflow_runs.set_tags(found.run_id, {RESULT: record.headline, VERDICT: record.outcome})
    return promotion


class _Objection(NamedTuple):
    why: str
    """Why a version must not become champion now, and what to do."""

    champion_changed: bool = False


def _objection(found: RegisteredVersion, verdict: Verdict | None, standing: Standing) -> _Objection | None:
    """Returns why the version must not become champion now; None if it can."""
    force = "--force --reason TEXT promotes it anyway"
    serving = found.record.serving
    if serving != "passed":
        return _Objection(f"its result of the serving gate is {serving or 'missing'}; {force}")
    judge = f"`convoy promote {found.name} {found.version} --judge` scores it against the present champion"
    if verdict is None:
        return _Objection(f"it has no verdict of the quality gate; {judge}")
    if not verdict.passed:
        return _Objection(f"the quality gate {verdict.summary}; {force}")
    champion = standing.version.address if standing.version else None
    if verdict.champion != champion:
        now = standing.note or (f"{found.name!r} was {standing.last}" if standing.last else "there is no champion now")
        return _Objection(f"it was judged against {verdict.champion or 'no champion'}, but {now}; {judge}", True)
    return None


def verdict_on(store: ObjectStore, found: RegisteredVersion) -> Verdict | None:
    """Returns the verdict that a version's tag names; None if it is missing, damaged or about another version.

    Raises:
        ServiceError: the object store failed.
    """
    sha256 = found.record.verdict_sha256
    if sha256 is None:
        return None
    try:
        data = store.get_bytes(bucket_layout.verdict(found.name, sha256))
    except ObjectMissing:
        return None
    if hashlib.sha256(data).hexdigest() != sha256:
        return None
    try:
        verdict = Verdict.model_validate_json(data)
    except ValidationError:  # another Convoy wrote it, with unknown conditions
        return None
    return verdict if verdict.challenger == found.address else None
