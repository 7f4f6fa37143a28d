"""Records which version of a model is its champion, in a history in the bucket that grows by compare-and-set.

Entries are models/<name>/history/<number>.json, counted from 1, each written once and never changed. The history
decides; the registry's aliases `champion` and `previous` are set, and repaired, from it. A champion that was deleted
from the registry is skipped: the last champion before it that still exists takes its place.
"""

import getpass
import os
import socket
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
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
    describe_model,
    set_alias,
)
from infra.tracking.model_versions import find_version
from infra.tracking.names import model_name_fault

CHAMPION, PREVIOUS = "champion", "previous"
READERS = 8  # threads that read entries


class PromotionLost(ServiceError):
    """Another promotion of the same model came first; nothing has changed."""


class AlreadyChampion(UsageError):
    """The version is the champion already; nothing has changed."""


class Lineage(Record):
    """The run, weights and data of a version, which the history protects even if MLflow has lost them.

    All fields are None in entries of an older Convoy.
    """

    run_id: str | None = None
    """Its MLflow run, and so its `runs/<run_id>/` in the bucket."""

    weights_key: str | None = None
    weights_sha256: str | None = None
    dataset_version: str | None = None
    dataset_name: str | None = None
    pretrained_sha256: str | None = None
    """Digest of the weights that its training started from; None for random weights."""


class Promotion(Lineage):
    """One entry of a model's history: a change of its champion.

    Unknown keys, which a later Convoy may add, are ignored. (Versions up to 171bc71 refuse them, and so the history:
    they stop with "is damaged" rather than promote or delete with incomplete knowledge.)
    """

    name: str
    number: int
    """Position in the history, from 1."""

    action: Literal["promote", "rollback"]
    from_version: str | None
    """The previous champion; None if there was none."""

    to_version: str
    """The new champion."""

    who: str
    """`user@host`."""

    when: datetime
    """In UTC, by the writer's clock; `number` defines the order."""

    reason: str = ""
    approved_by: str = ""
    """Name of the person who approved it, as given in Prefect; empty if nobody was asked."""

    forced: bool = False
    """Promoted although a gate did not pass it."""

    verdict_sha256: str | None = None
    """Digest of the quality gate's verdict; None if there was none."""

    verdict_summary: str = ""

    id: str
    """Random, so that two writers never send the same bytes, and a retry recognises its own entry."""

    def is_of(self, version: str, run_id: str | None) -> bool:
        """Returns whether it made the version of this number and run the champion.

        The number alone does not tell: MLflow counts from 1 again once a model has been deleted or renamed there.
        """
        return self.to_version == version and (None in (self.run_id, run_id) or self.run_id == run_id)

    def __str__(self) -> str:
        was = f" from version {self.from_version}" if self.from_version else ""
        did = "rolled back" if self.action == "rollback" else "promoted"
        approved = f", approved by {self.approved_by}," if self.approved_by else ""
        when = f"{self.when:%Y-%m-%d %H:%M:%S} UTC"
        return f"{did}{was} to version {self.to_version} by {self.who}{approved} at {when}"


def history(store: ObjectStore, name: str) -> list[Promotion]:
    """Returns all changes of a model's champion, oldest first; empty if no version was ever promoted.

    Raises:
        UsageError: the name is invalid.
        ServiceError: the store failed, or an entry is damaged.
    """
    with ThreadPoolExecutor(READERS) as pool:  # `in_parallel` ends at a signal; a promotion that is written does not
        return list(pool.map(partial(_read, store), _keys(store, name)))


def newest(store: ObjectStore, name: str) -> Promotion | None:
    """Returns the last change of a model's champion; None if no version was ever promoted."""
    keys = _keys(store, name)
    return _read(store, keys[-1]) if keys else None


def champions(entries: Iterable[Promotion]) -> list[Promotion]:
    """Returns the promotions of the versions that rollbacks can restore, that of the present champion last.

    A promotion adds a version; a rollback removes all after the one that it restored, so that a second rollback goes
    further back.
    """
    standing: list[Promotion] = []
    for entry in entries:
        if entry.action == "promote":
            standing.append(entry)
            continue
        standing.pop()
        while standing and not standing[-1].is_of(entry.to_version, entry.run_id):
            standing.pop()
    return standing


def registered_champions(
    entries: Iterable[Promotion], versions: Iterable[RegisteredVersion]
) -> list[RegisteredVersion]:
    """Returns the champions that rollbacks can restore, as far as they are among these versions of the model.

    The present champion is the last.
    """
    known = {version.version: version for version in versions}
    found = ((entry, known.get(entry.to_version)) for entry in champions(entries))
    return [version for entry, version in found if version and entry.is_of(version.version, version.run_id)]


class Standing(Record):
    """A model's champion, by its history and the registry."""

    entries: tuple[Promotion, ...]
    """The model's history."""

    version: RegisteredVersion | None
    """The last champion that is still in the registry; None if there is none."""

    @property
    def last(self) -> Promotion | None:
        """Returns the last change, even if its version was deleted: the `after` of the next one."""
        return self.entries[-1] if self.entries else None

    @property
    def note(self) -> str:
        """Returns a message if the registry lacks the champion: which version takes its place; else an empty text."""
        if self.last is None or (self.version and self.last.is_of(self.version.version, self.version.run_id)):
            return ""
        place = f"version {self.version.version}, the champion before, takes its place" if self.version else ""
        return (
            f"version {self.last.to_version} of {self.last.name!r}, its champion by the history, is not in MLflow's "
            f"registry any more; {place or 'no earlier champion is there either, so the model has none'}"
        )


def standing_champion(store: ObjectStore, name: str) -> Standing:
    """Returns the champion that new versions are compared with; skips champions that the registry lacks.

    Raises:
        UsageError: the name is invalid.
        ServiceError: a server failed, or an entry is damaged.
    """
    entries = history(store, name)
    return Standing(entries=tuple(entries), version=next(_present(name, champions(entries)), None))


def find_model(store: ObjectStore, reference: str) -> RegisteredVersion:
    """Does what `find_version` does, but the history says which version is the champion: its alias may not show it yet.

    Raises:
        UsageError: there is no such model, alias or version.
        ServiceError: a server failed, or an entry of the history is damaged.
    """
    name, _, alias = reference.removeprefix("models:/").partition("@")
    champion = None
    if alias in ("", CHAMPION) and not model_name_fault(name):  # a slash, before a number, is such a fault
        champion = standing_champion(store, name).version
    return champion or find_version(reference)


def lineage_of(entries: Sequence[Promotion], version: str) -> Lineage:
    """Returns a version's lineage from the newest of its entries that has one."""
    known = (entry for entry in reversed(entries) if entry.to_version == version and entry.run_id)
    fields = set(Lineage.model_fields)
    return Lineage.model_validate(next((entry.model_dump(include=fields) for entry in known), {}))


def promote(
    store: ObjectStore,
    model: ModelVersion,
    *,
    after: Promotion | None,
    lineage: Lineage | None = None,
    who: str | None = None,
    reason: str = "",
    approved_by: str = "",
    forced: bool = False,
    verdict_sha256: str | None = None,
    verdict_summary: str = "",
) -> Promotion:
    """Makes a version the champion, if `after` is still the last change, and moves the aliases.

    Of several promotions with the same `after`, exactly one succeeds. The caller decides whether the version is good
    enough.

    Args:
        after: the last change that the caller has seen (`newest`).
        lineage: the version's run, weights and data, for `convoy prune`.
        who: None takes the user of this process.

    Raises:
        PromotionLost: there was another change since `after`; the message names it.
        AlreadyChampion: the version is the champion already. Its aliases have been repaired, since a process that was
            killed after the promotion may not have moved them.
        ServiceError: a server failed (Outage: temporarily). If MLflow failed after the change, `repair_aliases` or a
            second call moves the aliases.
    """
    lineage = lineage or Lineage()
    if after and after.is_of(model.version, lineage.run_id):
        repair_aliases(store, model.name)
        raise AlreadyChampion(f"version {model.version} of {model.name!r} is its champion already: {after}")
    entry = Promotion(
        name=model.name,
        number=after.number + 1 if after else 1,
        action="promote",
        from_version=after.to_version if after else None,
        to_version=model.version,
        who=who or this_user(),
        when=datetime.now(UTC),
        reason=reason,
        approved_by=approved_by,
        forced=forced,
        verdict_sha256=verdict_sha256,
        verdict_summary=verdict_summary,
        id=uuid.uuid4().hex,
        **lineage.model_dump(),
    )
    return _append(store, entry)


def rollback(store: ObjectStore, name: str, *, who: str | None = None, reason: str = "") -> Promotion:
    """Restores the previous champion, and moves the aliases. A second rollback goes further back.

    Skips champions that were deleted from the registry.

    Raises:
        UsageError: there is no earlier champion.
        PromotionLost: another change came first; the message names it.
    """
    repair_aliases(store, name)
    entries = history(store, name)
    standing = champions(entries)
    champion, target = _champion_and_previous(name, standing)
    if target is None:
        what = f"version {champion} is the first champion of {name!r}" if champion else f"{name!r} has no champion"
        raise UsageError(f"{what}, so there is none to go back to; `convoy history {name}` shows all changes")
    entry = Promotion(
        name=name,
        number=entries[-1].number + 1,
        action="rollback",
        from_version=standing[-1].to_version,
        to_version=target,
        who=who or this_user(),
        when=datetime.now(UTC),
        reason=reason,
        id=uuid.uuid4().hex,
        **lineage_of(entries, target).model_dump(),
    )
    return _append(store, entry)


def repair_aliases(store: ObjectStore, name: str) -> list[str]:
    """Points `champion` and `previous` where the history says; returns the changes, one line per alias.

    A model without a history keeps its aliases. It may run at the same time as promotions: it reads the history again
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
        if changed and (champion := next(_present(name, champions(entries)), None)):
            describe_model(champion)
        if newest(store, name) == entries[-1]:
            break
        entries = history(store, name)
    return changed


def misplaced_aliases(store: ObjectStore, name: str) -> list[str]:
    """Returns the changes that `repair_aliases` would make, one line per alias."""
    entries = history(store, name)
    wrong = _misplaced(name, entries) if entries else ()
    return [f"{alias}: {found or 'none'} → {wanted or 'none'}" for alias, found, wanted in wrong]


def names_with_history(store: ObjectStore) -> list[str]:
    """Returns the names of the models that have a history."""
    keys = [info.key for info in store.list(bucket_layout.MODELS)]
    return sorted({bucket_layout.part(key, 1) for key in keys if bucket_layout.part(key, 2) == "history"})


def _misplaced(name: str, entries: Sequence[Promotion]) -> Iterator[tuple[str, str | None, str | None]]:
    """Yields each wrong alias with the version that it points at and the right one."""
    for alias, wanted in zip((CHAMPION, PREVIOUS), _champion_and_previous(name, champions(entries)), strict=True):
        found = aliased(name, alias)
        version = found.version if found else None
        if version != wanted:
            yield alias, version, wanted


def this_user() -> str:
    """Returns `user@host` of this process, with the user's number if there is no name, as in some containers."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def _append(store: ObjectStore, entry: Promotion) -> Promotion:
    stopping.check()  # the last moment at which nothing has changed yet
    key = bucket_layout.promotion(check_model_name(entry.name), entry.number)
    if not store.put_if_absent(key, entry.model_dump_json(indent=2).encode()):
        raise PromotionLost(
            f"{entry.name!r} was changed by another process meanwhile: {_read(store, key)}; nothing was done: "
            f"check `convoy history {entry.name}` and decide again"
        )
    try:
        repair_aliases(store, entry.name)
    except ServiceError as error:
        kind = Outage if isinstance(error, Outage) else ServiceError
        raise kind(
            f"{entry.name!r} was {entry}, but its aliases do not show it yet; "
            f"`convoy doctor --fix` repairs them: {error}"
        ) from error
    return entry


def _present(name: str, standing: Sequence[Promotion]) -> Iterator[RegisteredVersion]:
    """Yields the champions that are still in the registry, the present one first."""
    for entry in reversed(standing):
        with suppress(UsageError):
            found = find_version(f"{name}/{entry.to_version}")
            if entry.is_of(found.version, found.run_id):
                yield found


def _champion_and_previous(name: str, standing: Sequence[Promotion]) -> tuple[str | None, str | None]:
    """Returns the version that is champion, and another one that was before; both are still in the registry."""
    present = (each.version for each in _present(name, standing))
    champion = next(present, None)
    return champion, next((each for each in present if each != champion), None)


def _keys(store: ObjectStore, name: str) -> list[str]:
    """Returns the keys of a model's history in the order of their numbers."""
    return [info.key for info in store.list(bucket_layout.promotions(check_model_name(name)))]


def _read(store: ObjectStore, key: str) -> Promotion:
    try:
        return Promotion.model_validate_json(store.get_bytes(key))
    except ValidationError as error:
        raise ServiceError(f"{store.uri(key)} is damaged: {error.errors()[0]['msg']}") from error
