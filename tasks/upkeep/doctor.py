"""What killed processes and machines have left behind, and settling it.

It finds MLflow runs that no process goes on with, processes without their flow, flow runs without their process, leases
without their flow run, uploads and checkpoints that were never completed, half-written files on this machine, and
aliases that do not follow their model's history.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import psutil
from prefect.client.schemas.objects import StateType

from infra.machine.locks import is_held, try_locked
from infra.records import Record
from infra.settings import Settings
from infra.storage import bucket_layout
from infra.storage.bucket_layout import COMMIT
from infra.storage.object_store import ObjectInfo, ObjectStore, open_bucket
from infra.tracking import mlflow_runs
from infra.tracking.mlflow_runs import Run
from infra.tracking.promotion_history import misplaced_aliases, names_with_history, repair_aliases
from infra.tracking.tags import FLOW_RUN, MANIFEST_DIGEST
from tasks.orchestration.flow_runs import killed_flow_runs, mark_crashed, read_flow_run
from tasks.orchestration.model_lease import forgotten_leases, free_forgotten
from tasks.training.liveness import liveness, lock_file, orphaned, processes_of
from tasks.training.protocol.patience import SUPERVISOR_WAIT

GRACE = timedelta(days=1)
"""What is younger may be under way: a checkpoint between its file and its commit, or a large upload."""

ENDS_WITHIN = SUPERVISOR_WAIT + 10  # seconds that a supervisor takes at most to end its ranks, with a last checkpoint

Kind = Literal["process", "run", "flow", "lease", "upload", "checkpoint", "files", "alias"]


class Finding(Record):
    """Something that was left behind."""

    kind: Kind
    what: str
    """Which one: a run's id, a process id, an upload's key and id, a checkpoint's prefix, a folder, a model's name."""

    detail: str
    """Why it counts as left behind."""

    action: str
    """What settles it."""

    def __str__(self) -> str:
        return f"{self.kind} {self.what}: {self.detail}; {self.action}"


def find_orphans(grace: timedelta = GRACE) -> list[Finding]:
    """All that was left behind, in the order in which it is settled.

    Args:
        grace: age from which something unfinished in the bucket counts.

    Raises:
        ServiceError: the object store or MLflow failed.
    """
    return [finding for find, _ in _kinds(grace).values() for finding in find()]


def settle(findings: Iterable[Finding], grace: timedelta = GRACE) -> list[Finding]:
    """Settle findings, and return those that were; one that is no longer so, when it is looked at again, is not."""
    settled = []
    kinds = _kinds(grace)
    wanted = {(finding.kind, finding.what) for finding in findings}
    for kind in {kind: None for kind, _ in sorted(wanted, key=lambda each: list(kinds).index(each[0]))}:
        find, end = kinds[kind]
        for finding in list(find()):
            if (kind, finding.what) in wanted and end(finding.what):
                settled.append(finding)
    return settled


def settle_all(grace: timedelta = GRACE) -> list[Finding]:
    """Find and settle; what a worker does before it takes up work."""
    return settle(find_orphans(grace), grace)


Finder = Callable[[], Iterator[Finding]]
Ender = Callable[[str], bool]


def _kinds(grace: timedelta) -> dict[Kind, tuple[Finder, Ender]]:
    """For each kind, how to find and how to end; processes come first, since they keep their runs alive."""
    store = open_bucket(create=True)
    young = datetime.now(UTC) - grace
    return {
        "process": (_processes, _end_process),
        "run": (_runs, _close_run),
        "flow": (_flow_runs, _end_flow_run),
        "lease": (_leases, free_forgotten),
        "upload": (lambda: _uploads(store, young), lambda what: _abort(store, what)),
        "checkpoint": (lambda: _checkpoints(store, young), lambda what: _delete_checkpoint(store, what, young)),
        "files": (_work, _remove_work),
        "alias": (lambda: _aliases(store), lambda name: bool(repair_aliases(store, name))),
    }


def _processes() -> Iterator[Finding]:
    for process in processes_of(Settings().runs):
        if orphaned(process):
            yield Finding(
                kind="process",
                what=str(process.pid),
                detail=f"the flow of {' '.join(process.cmdline()[1:])} is gone",
                action="it is ended",
            )


def _end_process(what: str) -> bool:
    try:
        process = psutil.Process(int(what))
        for ask in (process.terminate, process.kill):
            ask()
            _, alive = psutil.wait_procs([process], timeout=ENDS_WITHIN)
            if not alive:
                return True
    except psutil.NoSuchProcess:
        return True
    return False


def _runs() -> Iterator[Finding]:
    for run in mlflow_runs.search_runs(MANIFEST_DIGEST):
        if run.status == "RUNNING" and (why := _abandoned(run)):
            yield Finding(
                kind="run",
                what=run.run_id,
                detail=f"MLflow says that it is running, but {why}",
                action="it becomes KILLED, its flow run Crashed; `convoy resume` goes on with it",
            )


def _abandoned(run: Run) -> str | None:
    """Why nobody goes on with a run; None if somebody may."""
    tag = run.tags.get(FLOW_RUN, "")
    flow_run = read_flow_run(tag)
    here = liveness(run.run_id, tag, flow_run.start_time if flow_run else None)
    if here == "alive":
        return None
    if tag and flow_run is None:
        return f"its flow run {tag} is gone"
    if flow_run and flow_run.state and flow_run.state.is_final():
        return f"its flow run {flow_run.name} is {flow_run.state.name}"
    if here == "dead" and not (flow_run and flow_run.state_type == StateType.SCHEDULED):  # a worker will take it up
        return "the process of its flow was killed"
    return None


def _close_run(run_id: str) -> bool:
    lock = lock_file(run_id)
    flow_run_id = ""
    try:
        with try_locked(lock) as held:  # whoever resumes it just now waits, or was faster
            tags = mlflow_runs.run_tags(run_id)
            if not held or MANIFEST_DIGEST not in tags or mlflow_runs.run_status(run_id) != "RUNNING":
                return False
            flow_run_id = tags.get(FLOW_RUN, "")
            mark_crashed(flow_run_id)
            mlflow_runs.end_run(run_id, "KILLED")
    except Exception:
        lock.write_text(flow_run_id)  # the next look should find it dead again
        raise
    return True


def _flow_runs() -> Iterator[Finding]:
    for killed in killed_flow_runs():
        yield Finding(
            kind="flow",
            what=str(killed.id),
            detail=f"Prefect says that flow run {killed.name} is {killed.state_name}, but its process was killed",
            action="it becomes Crashed",
        )


def _end_flow_run(what: str) -> bool:
    mark_crashed(what)
    return True


def _leases() -> Iterator[Finding]:
    for limit in forgotten_leases():
        yield Finding(
            kind="lease",
            what=limit,
            detail="Prefect says that it is taken, but no flow run holds it",
            action="it is freed",
        )


def _uploads(store: ObjectStore, young: datetime) -> Iterator[Finding]:
    for upload in store.uploads():
        if upload.begun < young:
            yield Finding(
                kind="upload",
                what=f"{upload.key} {upload.id}",
                detail=f"begun {upload.begun:%Y-%m-%d %H:%M} UTC and never completed",
                action="it is aborted",
            )


def _abort(store: ObjectStore, what: str) -> bool:
    for upload in store.uploads():
        if what == f"{upload.key} {upload.id}":
            store.abort_upload(upload)
    return True


def _checkpoints(store: ObjectStore, young: datetime) -> Iterator[Finding]:
    found: dict[str, list[ObjectInfo]] = {}
    for info in store.list(bucket_layout.RUNS):
        if bucket_layout.part(info.key, 2) == "checkpoints":
            found.setdefault(info.key.rpartition("/")[0] + "/", []).append(info)
    for prefix, files in found.items():
        if _is_abandoned(files, young):
            yield Finding(
                kind="checkpoint",
                what=prefix,
                detail=f"{len(files)} files without a commit, which nobody can use",
                action="they are deleted",
            )


def _is_abandoned(files: Sequence[ObjectInfo], young: datetime) -> bool:
    """Returns whether these files of a checkpoint have neither a commit nor a process that may still write one."""
    committed = any(info.key.endswith(f"/{COMMIT}") for info in files)
    return not committed and all(info.modified and info.modified < young for info in files)


def _delete_checkpoint(store: ObjectStore, prefix: str, young: datetime) -> bool:
    files = list(store.list(prefix))
    # Looked at again: a training that was resumed meanwhile makes its steps anew, under the same keys.
    if is_held(lock_file(bucket_layout.part(prefix, 1))) or not _is_abandoned(files, young):
        return False
    for info in files:
        store.delete(info.key)
    return True


def _aliases(store: ObjectStore) -> Iterator[Finding]:
    for name in names_with_history(store):
        if wrong := misplaced_aliases(store, name):
            yield Finding(
                kind="alias",
                what=name,
                detail=f"its aliases are not where its history says ({'; '.join(wrong)})",
                action="they are moved there",
            )


def _work() -> Iterator[Finding]:
    for folder in (Settings().home / "work").glob("*"):
        if not is_held(_work_lock(folder)):
            yield Finding(
                kind="files",
                what=str(folder),
                detail="half-written by a step that was killed",
                action="they are removed",
            )


def _remove_work(what: str) -> bool:
    with try_locked(_work_lock(Path(what))) as held:
        if held:
            shutil.rmtree(what, ignore_errors=True)
    return held


def _work_lock(folder: Path) -> Path:
    """Of the step that works in the folder."""
    return Settings().cache / "locks" / folder.name
