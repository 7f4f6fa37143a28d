"""Finds what in the bucket is in use: by a running training, an alias, or a champion that a rollback can restore."""

from collections.abc import Collection, Iterable
from functools import partial
from itertools import islice

from infra.errors import ServiceError
from infra.machine.locks import is_held
from infra.machine.threads import in_parallel
from infra.records import Record
from infra.settings import Settings
from infra.storage.object_store import ObjectStore
from infra.tracking import mlflow_runs
from infra.tracking.client import tracking_uri
from infra.tracking.model_registry import aliased_versions, search_versions
from infra.tracking.promotion_history import Lineage, champions, history, lineage_of, names_with_history
from infra.tracking.tags import DATASET_VERSION, FLOW_RUN, MANIFEST_DIGEST, SWEEP
from tasks.training.liveness import lock_file, orphaned, processes_of
from tasks.training.runs.lineage import run_lineage, version_lineage

MAX_NAMED = 5  # unknown versions, and unknown runs, in a message


class References(Record):
    """Runs, dataset versions and lineages that are in use."""

    statuses: dict[str, str]
    """Statuses of MLflow's runs that Convoy made, by id."""

    running: frozenset[str]
    """Runs that are running according to MLflow or to this machine's processes, or that a flow run waits to resume."""

    in_force: frozenset[str]
    """Runs of versions that have an alias, wait for approval, are champion, or can be restored by a rollback."""

    registered: frozenset[str]
    """Runs of any version."""

    lineages: tuple[Lineage, ...]
    """Lineages of the runs that are running or in force; one run may have several, of which one may hold more."""

    datasets: frozenset[str]
    """Dataset versions of the runs that are running or in force."""

    flow_runs: frozenset[str]
    """Flow runs of the running runs."""


def references(
    store: ObjectStore, stored: Collection[str], resumed: Collection[str] = (), *, forget_unknown: bool = False
) -> References:
    """Collects the references from the promotion histories, the registry, MLflow and this machine.

    Args:
        stored: runs that have objects in the bucket.
        resumed: runs, or sweeps of runs, that a flow run is to go on with; they count as running.
        forget_unknown: continue if MLflow does not know some of these runs, or versions in the histories. Champions in
            the histories stay in force.

    Raises:
        ServiceError: a server failed, a history is damaged, or MLflow does not know what it should: the bucket may
            belong to another MLflow, so nothing may be removed.
    """
    aliased = aliased_versions()
    versions = {(version.name, version.version): version for version in search_versions()}
    runs = {run.run_id: run for run in mlflow_runs.search_runs(MANIFEST_DIGEST)}
    restorable = _restorable(store)
    if not forget_unknown:
        missing = [key for key in sorted(restorable.keys() - versions.keys()) if not _is_known(restorable[key].run_id)]
        _check_known(missing, sorted(set(stored) - runs.keys()))
    in_force = [
        version
        for key, version in versions.items()
        if key in aliased or key in restorable or version.record.awaits_approval
    ]
    running = {run.run_id for run in runs.values() if run.status == "RUNNING"} | _with_process(runs)
    running |= {run.run_id for run in runs.values() if run.run_id in resumed or run.tags.get(SWEEP) in resumed}
    lineages = [
        *restorable.values(),  # MLflow may not know them
        *(version_lineage(store, version) for version in in_force),
        *(run_lineage(store, run_id) for run_id in sorted(running)),
    ]
    datasets = {lineage.dataset_version for lineage in lineages}
    # A run that has just begun has this tag before it has a record.
    datasets |= {runs[run_id].tags.get(DATASET_VERSION) for run_id in running if run_id in runs}
    return References(
        statuses={run.run_id: run.status for run in runs.values()},
        running=frozenset(running),
        in_force=frozenset(lineage.run_id for lineage in lineages if lineage.run_id and lineage.run_id not in running),
        registered=frozenset(version.run_id for version in versions.values()),
        lineages=tuple(lineages),
        datasets=frozenset(version for version in datasets if version),
        flow_runs=frozenset(runs[run_id].tags.get(FLOW_RUN, "") for run_id in running if run_id in runs),
    )


def _restorable(store: ObjectStore) -> dict[tuple[str, str], Lineage]:
    """Returns the lineages of champions and of earlier champions that a rollback can restore, by name and version."""
    names = names_with_history(store)
    histories = dict(zip(names, in_parallel(partial(history, store), names), strict=True))
    return {
        (name, entry.to_version): lineage_of(entries, entry.to_version)
        for name, entries in histories.items()
        for entry in champions(entries)
    }


def _is_known(run_id: str | None) -> bool:
    """Returns whether MLflow knows a run, maybe as deleted: then a version that it lacks was deleted or renamed."""
    return bool(run_id and mlflow_runs.run_tags(run_id))


def _check_known(versions: list[tuple[str, str]], runs: list[str]) -> None:
    """Raises ServiceError if any of them is unknown to MLflow; runs that were deleted there are known."""
    unknown = list(islice((run_id for run_id in runs if not _is_known(run_id)), MAX_NAMED))
    if not versions and not unknown:
        return
    kinds = {"promoted versions": ["/".join(each) for each in versions[:MAX_NAMED]], "runs": unknown}
    named = " and ".join(f"{kind} {', '.join(names)}" for kind, names in kinds.items() if names)
    raise ServiceError(
        f"MLflow at {tracking_uri()} does not know {named}, of which the bucket holds data: is it the MLflow "
        "that recorded them? Nothing was removed; if they were deleted, use `convoy prune --forget-unknown`"
    )


def _with_process(runs: Iterable[str]) -> set[str]:
    """Returns the runs that have a process on this machine, whatever MLflow says."""
    folder = Settings().runs
    processes = (process for process in processes_of(folder) if not orphaned(process))
    folders = {name for process in processes for name in process.cmdline() if name.startswith(str(folder))}
    return {run_id for run_id in runs if is_held(lock_file(run_id)) or str(folder / run_id) in folders}
