"""Lists the registered models, each with its champion."""

from datetime import datetime, timedelta

from infra.machine.threads import in_parallel
from infra.records import Record
from infra.storage.object_store import ObjectStore
from infra.tracking.model_registry import RegisteredVersion, search_versions
from infra.tracking.names import model_name_fault
from infra.tracking.promotion_history import Standing, history, registered_champions

UNITS = (("d", timedelta(days=1)), ("h", timedelta(hours=1)), ("min", timedelta(minutes=1)))


class Model(Record):
    """A registered model in the list."""

    name: str
    versions: int
    """Number of its versions."""

    champion: str | None
    """The champion's version; None if there is none, as then in the next two fields."""

    accuracy: float | None
    """The champion's accuracy on the test split."""

    created: datetime | None
    """When the champion was registered."""

    note: str
    """A message if MLflow lacks the champion that the history names; else empty."""

    def cells(self, now: datetime) -> list[str]:
        """Returns name, the champion's version, accuracy on the test split and age, and the number of versions."""
        return [
            self.name,
            self.champion or "none",
            "" if self.accuracy is None else f"{self.accuracy:.2%}",
            age(now - self.created) if self.created else "",
            str(self.versions),
        ]


def list_models(store: ObjectStore) -> list[Model]:
    """Returns the models that have versions, by name; the history decides which version is the champion.

    Raises:
        ServiceError: a server failed, or an entry of a history is damaged.
    """
    by_name: dict[str, list[RegisteredVersion]] = {}
    for version in search_versions():
        by_name.setdefault(version.name, []).append(version)
    return in_parallel(lambda name: _model(store, name, by_name[name]), sorted(by_name))


def _model(store: ObjectStore, name: str, versions: list[RegisteredVersion]) -> Model:
    entries = [] if model_name_fault(name) else history(store, name)  # another program may use other names
    champion = next(reversed(registered_champions(entries, versions)), None)
    return Model(
        name=name,
        versions=len(versions),
        champion=champion and champion.version,
        accuracy=champion and champion.record.accuracy,
        created=champion and champion.created,
        note=Standing(entries=tuple(entries), version=champion).note,
    )


def age(span: timedelta) -> str:
    """Returns a span in the largest unit that it fills: days, hours or minutes."""
    return next((f"{span // unit} {name}" for name, unit in UNITS if span >= unit), "0 min")
