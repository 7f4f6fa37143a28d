"""Promotion with its conditions: a version becomes champion if its gates passed it against the present champion.

Nothing here loads torch or Prefect.
"""

import hashlib
from itertools import dropwhile
from typing import NamedTuple

from pydantic import ValidationError

from infra.errors import GateRefused, UsageError
from infra.storage import bucket_layout
from infra.storage.object_store import ObjectStore, open_bucket
from infra.storage.s3_client import ObjectMissing
from infra.tracking.model_registry import ModelVersion, RegisteredVersion, search_versions
from infra.tracking.model_versions import find_version
from infra.tracking.promotion_history import (
    Promotion,
    Standing,
    champions,
    history,
    promote,
    repair_aliases,
    standing_champion,
)
from tasks.release.verdict import Verdict
from tasks.training.runs.lineage import version_lineage


class PromotionRefused(GateRefused):
    """A gate has not passed the version; nothing was changed."""


class ChampionData(NamedTuple):
    """Dataset versions that champions of a model learned from; None where there is none, or it is not known."""

    present: str | None
    oldest: str | None
    """That of the oldest champion that a rollback can reach."""


def champion_data(name: str) -> ChampionData:
    """Returns what a model's champions learned from, its aliases repaired.

    Raises:
        UsageError: not a name for a model.
        ServiceError: a server failed.
    """
    standing = repaired_champion(open_bucket(create=True), name)
    if standing.version is None:
        return ChampionData(None, None)
    there = {each.version: each.record.dataset_version for each in search_versions(name=name)}
    known = (there.get(version) for version in champions(standing.entries))
    return ChampionData(standing.version.record.dataset_version, next(filter(None, known), None))


def repaired_champion(store: ObjectStore, name: str) -> Standing:
    """Repairs a model's aliases, as every flow does at its start, and returns its champion; warns of what was wrong.

    Raises:
        UsageError: not a name for a model.
        ServiceError: a server failed.
    """
    from tasks.orchestration.progress import run_logger  # only here: it loads Prefect, which the commands do without

    for change in repair_aliases(store, name):
        run_logger().warning("alias of %s repaired from its history: %s", name, change)
    standing = standing_champion(store, name)
    if standing.note:
        run_logger().warning("%s", standing.note)
    return standing


def promotions_of(version: ModelVersion) -> list[Promotion]:
    """Returns the history from the promotion of this version on, its aliases repaired; empty if it was never promoted.

    Raises:
        ServiceError: a server failed.
    """
    store = open_bucket()
    entries = history(store, version.name)
    entries = list(dropwhile(lambda each: (each.action, each.to_version) != ("promote", version.version), entries))
    if entries:
        repair_aliases(store, version.name)
    return entries


def promote_version(version: ModelVersion, *, force: bool = False, reason: str = "") -> Promotion:
    """Make a version the champion, if it was verified and its quality verdict against the present champion is a yes.

    Args:
        force: promote it whatever the gates said; wants a reason.

    Raises:
        UsageError: there is no such version, or no reason was given.
        AlreadyChampion: it is the champion.
        PromotionRefused: a gate has not passed it, or passed it against another champion than the present one.
        PromotionLost: another promotion came first.
        ServiceError: a server failed.
    """
    if force and not reason.strip():
        raise UsageError("--force wants a --reason, which is kept in the history")
    store = open_bucket(create=True)
    # All that follows is decided on this: a promotion that comes in between makes ours lose.
    standing = standing_champion(store, version.name)
    last = standing.last
    found = find_version(version.address)
    verdict = verdict_on(store, found)
    is_champion = last is not None and last.to_version == found.version  # which `promote` says best
    objection = None if is_champion else _objection(found, verdict, standing)
    if objection and not force:
        raise PromotionRefused(f"{found.address} is not promoted: {objection}")
    return promote(
        store,
        found,
        after=last,
        lineage=version_lineage(store, found),
        reason=reason,
        forced=objection is not None,
        verdict_sha256=found.record.verdict_sha256 if verdict else None,  # of its bytes, which may be older code's
        verdict_summary=verdict.summary if verdict else "",
    )


def _objection(found: RegisteredVersion, verdict: Verdict | None, standing: Standing) -> str | None:
    """Returns why the version may not become champion now, and what would help; None if it may."""
    force = "--force --reason TEXT promotes it all the same"
    serving = found.record.serving
    if serving != "passed":
        return f"the serving gate says {serving or 'nothing'} of it; {force}"
    judge = f"`convoy promote {found.name} {found.version} --judge` scores it against the present champion"
    if verdict is None:
        return f"it has no verdict of the quality gate; {judge}"
    if not verdict.passed:
        return f"the quality gate {verdict.summary}; {force}"
    champion = standing.version.address if standing.version else None
    if verdict.champion != champion:
        now = standing.note or (f"{found.name!r} was {standing.last}" if standing.last else "there is none now")
        return f"it was judged against {verdict.champion or 'no champion'}, but {now}; {judge}"
    return None


def verdict_on(store: ObjectStore, found: RegisteredVersion) -> Verdict | None:
    """Returns the verdict that a version's tag names; None if there is none on this version, or it is not intact.

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
    except ValidationError:  # written by another Convoy, whose conditions this one does not know
        return None
    return verdict if verdict.challenger == found.address else None
