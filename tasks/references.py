"""What must not be removed from the bucket, because something that counts rests on it."""

import json
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict

from infra import tracking
from infra.errors import ServiceError
from infra.objectstore import ObjectMissing, ObjectStore
from infra.promotion import champions, history
from infra.registry import RegisteredRun, every_version
from infra.settings import Settings
from infra.trylock import is_held
from tasks.alive import lock_file, orphaned, processes_of
from tasks.run import FLOW_RUN, MANIFEST_DIGEST
from tasks.versiontags import DATASET_VERSION


class RecordDamaged(ServiceError):
    """A run's record cannot be read, so what the run needs is not known."""


class References(BaseModel):
    """Who needs what."""

    model_config = ConfigDict(frozen=True)

    statuses: dict[str, str]
    """Of MLflow's runs that are ours."""

    running: frozenset[str]
    """Runs that are at work, as MLflow or this machine's processes say."""

    in_force: frozenset[str]
    """Runs of versions that have an alias, or that are or can again be champion."""

    registered: frozenset[str]
    """Runs of any version."""

    datasets: frozenset[str]
    """Dataset versions of the runs at work and in force."""

    flow_runs: frozenset[str]
    """Of the runs at work."""


class RunNeeds(BaseModel):
    """What a run's record says that it was made of; read leniently, since earlier code may have written it."""

    model_config = ConfigDict(frozen=True)

    dataset_version: str | None = None
    dataset_name: str | None = None
    pretrained_sha256: str | None = None


def references(store: ObjectStore) -> References:
    """Ask the promotion histories, the registry, MLflow and this machine.

    Raises:
        ServiceError: one of them failed, or a history is damaged: then nothing is known, and nothing may go.
    """
    versions = every_version()
    runs = {run.run_id: run for run in tracking.every_run(MANIFEST_DIGEST)}
    in_force = _in_force(store, versions)
    running = {run.run_id for run in runs.values() if run.status == "RUNNING"} | _alive(runs)
    datasets = {version.tags.get(DATASET_VERSION) for version in in_force}
    # A run that has just begun has this tag before it has a record.
    datasets |= {runs[run_id].tags.get("convoy.dataset_version") for run_id in running if run_id in runs}
    made = {version.run_id for version in in_force}
    datasets |= {needs(store, run_id).dataset_version for run_id in running | made}
    return References(
        statuses={run.run_id: run.status for run in runs.values()},
        running=frozenset(running),
        in_force=frozenset(made),
        registered=frozenset(version.run_id for version in versions),
        datasets=frozenset(version for version in datasets if version),
        flow_runs=frozenset(runs[run_id].tags.get(FLOW_RUN, "") for run_id in running if run_id in runs),
    )


def needs(store: ObjectStore, run_id: str) -> RunNeeds:
    """What a run was made of; nothing if it has left no record.

    Raises:
        RecordDamaged: it cannot be read.
        ServiceError: the storage failed.
    """
    key = f"runs/{run_id}/run.json"
    try:
        record = json.loads(store.get_bytes(key))
        return RunNeeds(
            dataset_version=record["dataset"]["version"],
            dataset_name=record["dataset"]["name"],
            pretrained_sha256=record["manifest"]["config"].get("pretrained_sha256"),
        )
    except ObjectMissing:
        return RunNeeds()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordDamaged(f"{store.uri(key)} is damaged ({error}), so what the run needs is not known") from error


def _in_force(store: ObjectStore, versions: Iterable[RegisteredRun]) -> list[RegisteredRun]:
    standing = {(name, version) for name in _with_history(store) for version in champions(history(store, name))}
    return [version for version in versions if version.aliases or (version.name, version.version) in standing]


def _with_history(store: ObjectStore) -> set[str]:
    return {info.key.split("/")[1] for info in store.list("models/") if "/history/" in info.key}


def _alive(runs: Iterable[str]) -> set[str]:
    """Runs of this machine that have a process, whatever MLflow says."""
    folder = Settings().runs
    working = (process for process in processes_of(folder) if not orphaned(process))
    said = {name for process in working for name in process.cmdline() if name.startswith(str(folder))}
    return {run_id for run_id in runs if is_held(lock_file(run_id)) or str(folder / run_id) in said}
