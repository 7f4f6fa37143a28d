"""Which version of a model is its champion: a history in the bucket, appended to by compare-and-set.

models/<name>/history/<number>.json, counted from 1, each written once and never changed. The history is the truth;
the registry's aliases `champion` and `previous` follow it, and are repaired from it. A champion that was deleted from
the registry is passed over: the last one before it that is still there takes its place.
"""

import getpass
import os
import socket
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Literal

from pydantic import ValidationError

from infra.errors import Outage, ServiceError, UsageError
from infra.machine import stopping
from infra.records import Record
from infra.storage import bucket_layout
from infra.storage.object_store import ObjectStore
from infra.tracking.model_registry import (
    ModelVersion,
    RegisteredVersion,
    aliased,
    check_model_name,
    delete_alias,
    set_alias,
)
from infra.tracking.model_versions import find_version

CHAMPION, PREVIOUS = "champion", "previous"


class PromotionLost(ServiceError):
    """Another promotion of the same model came first; nothing was changed."""


class AlreadyChampion(UsageError):
    """The version is the champion; nothing was changed."""


class Lineage(Record):
    """The run, weights and data that a version rests on: the history protects them, whatever MLflow still knows.

    All None in entries of an older Convoy.
    """

    run_id: str | None = None
    """Its MLflow run, hence `runs/<run_id>/` in the bucket."""

    weights_key: str | None = None
    weights_sha256: str | None = None
    dataset_version: str | None = None
    dataset_name: str | None = None
    pretrained_sha256: str | None = None
    """Digest of the weights that its training began with; None if it began with random ones."""


class Promotion(Lineage):
    """One entry of a model's history: a change of its champion.

    Keys that a later Convoy may add are passed over. (Versions up to 171bc71 refuse them, and with them the history:
    they stop with "is damaged" rather than promote or delete by half of what is known.)
    """

    name: str
    number: int
    """Position in the history, from 1."""

    action: Literal["promote", "rollback"]
    from_version: str | None
    """The champion before; None if there was none."""

    to_version: str
    """The champion from then on."""

    who: str
    """`user@host`."""

    when: datetime
    """In UTC, by the writer's clock; the order is that of the numbers."""

    reason: str = ""
    forced: bool = False
    """Promoted although a gate had not passed it."""

    verdict_sha256: str | None = None
    """Digest of the quality gate's verdict; None if there was none."""

    verdict_summary: str = ""

    id: str
    """Random, so that no two writers ever send the same bytes, and a retry can tell its own from another's."""

    def __str__(self) -> str:
        was = f" from version {self.from_version}" if self.from_version else ""
        did = "rolled back" if self.action == "rollback" else "promoted"
        return f"{did}{was} to version {self.to_version} by {self.who} at {self.when:%Y-%m-%d %H:%M:%S} UTC"


def history(store: ObjectStore, name: str) -> list[Promotion]:
    """Every change of a model's champion, the oldest first; empty if nothing was ever promoted.

    Raises:
        UsageError: not a name for a model.
        ServiceError: the store failed, or an entry is damaged.
    """
    return [_read(store, info.key) for info in store.list(_prefix(name))]


def newest(store: ObjectStore, name: str) -> Promotion | None:
    """The last change of a model's champion; None if nothing was ever promoted."""
    keys = [info.key for info in store.list(_prefix(name))]  # in their order, hence that of the numbers
    return _read(store, keys[-1]) if keys else None


def champions(entries: Sequence[Promotion]) -> list[str]:
    """The versions that a rollback can go back through, the present champion last.

    A promotion adds one; a rollback takes away all above the one that it brought back, so that a second rollback goes
    further back.
    """
    standing: list[str] = []
    for entry in entries:
        if entry.action == "promote":
            standing.append(entry.to_version)
            continue
        standing.pop()
        while standing and standing[-1] != entry.to_version:
            standing.pop()
    return standing


class Standing(Record):
    """A model's champion, by its history and the registry together."""

    entries: tuple[Promotion, ...]
    """Its history."""

    version: RegisteredVersion | None
    """The last champion that the registry still has; None if it has none of them, or nothing was ever promoted."""

    @property
    def last(self) -> Promotion | None:
        """The last change, whatever it named: what a further one has to come `after`."""
        return self.entries[-1] if self.entries else None

    @property
    def note(self) -> str:
        """Says that the registry lacks the champion, and what takes its place; empty if it does not."""
        if self.last is None or (self.version and self.version.version == self.last.to_version):
            return ""
        place = f"version {self.version.version}, the champion before, takes its place" if self.version else ""
        return (
            f"version {self.last.to_version} of {self.last.name!r}, its champion by the history, is not in MLflow's "
            f"registry any more; {place or 'no earlier champion is there either, so this counts as having none'}"
        )


def standing_champion(store: ObjectStore, name: str) -> Standing:
    """Returns the champion that versions are compared with; one that the registry lacks counts as not there.

    Raises:
        UsageError: not a name for a model.
        ServiceError: a server failed, or an entry is damaged.
    """
    entries = history(store, name)
    return Standing(entries=tuple(entries), version=next(_present(name, champions(entries)), None))


def lineage_of(entries: Sequence[Promotion], version: str) -> Lineage:
    """Returns what the entries say that a version was made of: the newest that says anything."""
    known = (entry for entry in reversed(entries) if entry.to_version == version and entry.run_id)
    return Lineage.model_validate(next((entry.model_dump(include=_LINEAGE) for entry in known), {}))


_LINEAGE = set(Lineage.model_fields)


def promote(
    store: ObjectStore,
    model: ModelVersion,
    *,
    after: Promotion | None,
    lineage: Lineage | None = None,
    who: str | None = None,
    reason: str = "",
    forced: bool = False,
    verdict_sha256: str | None = None,
    verdict_summary: str = "",
) -> Promotion:
    """Makes a version the champion, if `after` is still the last change, and moves the aliases.

    Of several promotions that saw the same `after`, exactly one succeeds. Whether the version deserves it is for the
    caller to know.

    Args:
        after: the last change that the caller knows of (`newest`), on which its decision rests.
        lineage: what the version was made of, for `convoy prune`.
        who: None takes the user of this process.

    Raises:
        PromotionLost: there was another change since `after`; the message names it.
        AlreadyChampion: the version is the champion; its aliases, which a process that was killed in between may not
            have moved, have been repaired.
        ServiceError: a server failed (Outage: it was away). If it was MLflow, after the change, `repair_aliases` or a
            second call finishes it.
    """
    champion = after.to_version if after else None
    if champion == model.version:
        repair_aliases(store, model.name)
        raise AlreadyChampion(f"version {model.version} of {model.name!r} is its champion already: {after}")
    entry = Promotion(
        name=model.name,
        number=after.number + 1 if after else 1,
        action="promote",
        from_version=champion,
        to_version=model.version,
        who=who or this_user(),
        when=datetime.now(UTC),
        reason=reason,
        forced=forced,
        verdict_sha256=verdict_sha256,
        verdict_summary=verdict_summary,
        id=uuid.uuid4().hex,
        **(lineage or Lineage()).model_dump(),
    )
    return _append(store, entry)


def rollback(store: ObjectStore, name: str, *, who: str | None = None, reason: str = "") -> Promotion:
    """Bring back the champion before the present one, and have the aliases follow.

    Champions that were deleted from the registry are skipped. A second rollback goes further back.

    Raises:
        UsageError: there is no earlier champion.
        PromotionLost: another change came first; the message names it.
    """
    repair_aliases(store, name)
    entries = history(store, name)
    standing = champions(entries)
    present = standing[-1] if standing else None
    target = next(_present(name, standing[:-1]), None)
    if target is None:
        what = f"version {present} is the first champion of {name!r}" if present else f"{name!r} has no champion"
        raise UsageError(f"{what}, so there is none to go back to; `convoy history {name}` shows all changes")
    entry = Promotion(
        name=name,
        number=entries[-1].number + 1,
        action="rollback",
        from_version=present,
        to_version=target.version,
        who=who or this_user(),
        when=datetime.now(UTC),
        reason=reason,
        id=uuid.uuid4().hex,
        **lineage_of(entries, target.version).model_dump(),
    )
    return _append(store, entry)


def repair_aliases(store: ObjectStore, name: str) -> list[str]:
    """Points `champion` and `previous` where the history says; returns what had to be changed, a line each.

    A model without a history keeps the aliases it has. Safe to run beside promotions: it looks at the history again
    after each change, so that a process that wrote an outdated alias corrects it.
    """
    changed: list[str] = []
    entries = history(store, name)
    while entries:
        for alias, found, wanted in _misplaced(name, entries):
            if wanted is None:
                delete_alias(name, alias)
            else:
                set_alias(ModelVersion(name=name, version=wanted), alias)
            changed.append(f"{alias}: {found or 'none'} → {wanted or 'none'}")
        last = newest(store, name)
        if last == entries[-1]:
            break
        entries = history(store, name)
    return changed


def misplaced_aliases(store: ObjectStore, name: str) -> list[str]:
    """Returns what `repair_aliases` would change, a line each."""
    entries = history(store, name)
    wrong = _misplaced(name, entries) if entries else ()
    return [f"{alias}: {found or 'none'} → {wanted or 'none'}" for alias, found, wanted in wrong]


def names_with_history(store: ObjectStore) -> list[str]:
    """Returns the models of which a version was ever promoted."""
    keys = [info.key for info in store.list(bucket_layout.MODELS)]
    return sorted({bucket_layout.part(key, 1) for key in keys if bucket_layout.part(key, 2) == "history"})


def _misplaced(name: str, entries: Sequence[Promotion]) -> Iterator[tuple[str, str | None, str | None]]:
    """Alias, the version that it names, and the one that it should name."""
    present = _present(name, champions(entries))
    for alias in (CHAMPION, PREVIOUS):
        wanted, found = next(present, None), aliased(name, alias)
        pair = found.version if found else None, wanted.version if wanted else None
        if pair[0] != pair[1]:
            yield alias, *pair


def this_user() -> str:
    """`user@host` of this process; a user without a name, as in some containers, goes by number."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def _append(store: ObjectStore, entry: Promotion) -> Promotion:
    stopping.check()  # the last moment at which it can be left undone
    if not store.put_if_absent(_key(entry.name, entry.number), entry.model_dump_json(indent=2).encode()):
        winner = _read(store, _key(entry.name, entry.number))
        raise PromotionLost(
            f"{entry.name!r} was changed by another meanwhile: {winner}; nothing was done: "
            f"look at `convoy history {entry.name}`, and decide anew"
        )
    try:
        repair_aliases(store, entry.name)
    except ServiceError as error:
        kind = Outage if isinstance(error, Outage) else ServiceError
        raise kind(
            f"{entry.name!r} was {entry}, but its aliases do not show it yet; "
            f"`convoy history {entry.name}` repairs them: {error}"
        ) from error
    return entry


def _present(name: str, standing: Sequence[str]) -> Iterator[RegisteredVersion]:
    """Yields those of the champions that the registry still has, the present one first."""
    for version in reversed(standing):
        with suppress(UsageError):
            yield find_version(f"{name}/{version}")


def _prefix(name: str) -> str:
    return bucket_layout.promotions(check_model_name(name))


def _key(name: str, number: int) -> str:
    return bucket_layout.promotion(check_model_name(name), number)


def _read(store: ObjectStore, key: str) -> Promotion:
    try:
        return Promotion.model_validate_json(store.get_bytes(key))
    except ValidationError as error:
        raise ServiceError(f"{store.uri(key)} is damaged: {error.errors()[0]['msg']}") from error
