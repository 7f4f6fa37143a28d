"""Finds and settles what killed processes and machines have left behind.

Leftovers are MLflow runs that no process continues, processes without their flow, flow runs without their process,
leases without their flow run, uploads and checkpoints that were never completed, half-written files on this machine,
and aliases that do not follow their model's history.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

import psutil
from prefect.client.schemas.objects import TERMINAL_STATES, StateType

from infra.errors import counted
from infra.machine.locks import is_held, try_locked
from infra.machine.threads import in_parallel
from infra.records import Record
from infra.settings import Settings
from infra.storage import bucket_layout
from infra.storage.bucket_layout import COMMIT
from infra.storage.object_store import ObjectInfo, ObjectStore, open_bucket
from infra.tracking import mlflow_runs
from infra.tracking.mlflow_runs import Run
from infra.tracking.promotion_history import misplaced_aliases, names_with_history, repair_aliases
from infra.tracking.tags import FLOW_RUN, FLOW_RUN_URL, MANIFEST_DIGEST, SWEEP
from tasks.orchestration.flow_runs import killed_flow_runs, mark_dead, page_of, read_flow_run
from tasks.orchestration.model_lease import forgotten_leases, free_forgotten
from tasks.training.liveness import liveness, lock_file, orphaned, processes_of
from tasks.training.protocol.board import Board
from tasks.training.protocol.patience import SUPERVISOR_WAIT

LOOPBACK = ("127.0.0.1", "localhost", "::1")

GRACE = timedelta(days=1)
"""Younger objects may still be in use: a checkpoint between its file and its commit, or a large upload."""

END_SECONDS = SUPERVISOR_WAIT + 10  # that a supervisor takes at most to end its ranks, including a last checkpoint

Kind = Literal["process", "run", "flow", "lease", "upload", "checkpoint", "files", "alias"]


class Finding(Record):
    """Something that was left behind."""

    kind: Kind
    what: str
    """A run's id, a process id, an upload's key and id, a checkpoint's prefix, a folder, or a model's name."""

    detail: str
    """Why it counts as left behind."""

    action: str
    """What settles it."""

    def __str__(self) -> str:
        return f"{self.kind} {self.what}: {self.detail}; {self.action}"


class _Method(NamedTuple):
    """How one kind of finding is found and settled."""

    find: Callable[[], Iterator[tuple[str, str]]]
    """Yields `what` and `detail` of each finding."""

    settle: Callable[[str], bool]
    """Settles the finding of a `what` and returns True, unless a new check shows that it is no longer left behind."""

    action: str

    def findings(self, kind: Kind) -> list[Finding]:
        return [Finding(kind=kind, what=what, detail=detail, action=self.action) for what, detail in self.find()]


def find_orphans(grace: timedelta = GRACE) -> list[Finding]:
    """Returns all leftovers, in the order in which they are settled.

    Args:
        grace: age from which something unfinished in the bucket counts.

    Raises:
        ServiceError: the object store or MLflow failed.
    """
    return [finding for kind, method in _methods(grace).items() for finding in method.findings(kind)]


def settle(findings: Iterable[Finding], grace: timedelta = GRACE) -> list[Finding]:
    """Settles findings that are still left behind when they are checked again; returns the settled ones."""
    wanted = {(finding.kind, finding.what) for finding in findings}
    kinds = {kind for kind, _ in wanted}
    settled = []
    for kind, method in _methods(grace).items():
        for finding in method.findings(kind) if kind in kinds else ():
            if (kind, finding.what) in wanted and method.settle(finding.what):
                settled.append(finding)
    return settled


def settle_all(grace: timedelta = GRACE) -> list[Finding]:
    """Finds and settles all leftovers; a worker does so when it starts."""
    return settle(find_orphans(grace), grace)


def _methods(grace: timedelta) -> dict[Kind, _Method]:
    """Returns the method of each kind. Processes come first, since they keep their runs alive."""
    store = open_bucket(create=True)
    young = datetime.now(UTC) - grace
    closed = "it becomes KILLED, its flow run Crashed; `convoy resume`, or `convoy sweep --resume`, goes on with it"
    return {
        "process": _Method(_processes, _end_process, "it is ended"),
        "run": _Method(_runs, close_run, closed),
        "flow": _Method(_flow_runs, _end_flow_run, "it becomes Crashed, or Cancelled if somebody asked for that"),
        "lease": _Method(_leases, free_forgotten, "it is freed"),
        "upload": _Method(lambda: _uploads(store, young), lambda what: _abort(store, what), "it is aborted"),
        "checkpoint": _Method(
            lambda: _checkpoints(store, young), lambda what: _delete_checkpoint(store, what, young), "they are deleted"
        ),
        "files": _Method(_work, _remove_work, "they are removed"),
        "alias": _Method(
            lambda: _aliases(store), lambda name: bool(repair_aliases(store, name)), "they are moved there"
        ),
    }


def _processes() -> Iterator[tuple[str, str]]:
    for process in processes_of(Settings().runs):
        if orphaned(process):
            yield str(process.pid), f"the flow of {' '.join(process.cmdline()[1:])} is gone"


def _end_process(what: str) -> bool:
    try:
        process = psutil.Process(int(what))
        for end in (process.terminate, process.kill):
            end()
            _, alive = psutil.wait_procs([process], timeout=END_SECONDS)
            if not alive:
                return True
    except psutil.NoSuchProcess:
        return True
    return False


def _runs() -> Iterator[tuple[str, str]]:
    found = {run.run_id: run for tag in (MANIFEST_DIGEST, SWEEP) for run in mlflow_runs.search_runs(tag, running=True)}
    for run in found.values():
        if _is_of_a_flow(run.run_id, run.tags) and (why := _abandoned(run)):
            yield run.run_id, f"MLflow says that it is running, but {why}"


def _is_of_a_flow(run_id: str, tags: Mapping[str, str]) -> bool:
    """Returns whether a run is a training, or a sweep."""
    return MANIFEST_DIGEST in tags or tags.get(SWEEP) == run_id


def _abandoned(run: Run) -> str | None:
    """Returns why no process continues a run; None if one may."""
    tag = run.tags.get(FLOW_RUN, "")
    flow_run = read_flow_run(tag)
    here = liveness(run.run_id, tag, flow_run.start_time if flow_run else None)
    if here == "alive":
        return None
    if tag and flow_run is None and _is_of_this_prefect(run.tags.get(FLOW_RUN_URL), tag):
        return f"its flow run {tag} is gone"
    if flow_run and flow_run.state and flow_run.state.is_final():
        return f"its flow run {flow_run.name} is {flow_run.state.name}"
    if here == "dead" and not (flow_run and flow_run.state_type == StateType.SCHEDULED):  # a worker will run it again
        return "the process of its flow was killed"
    return None


def _is_of_this_prefect(address: str | None, flow_run: str) -> bool:
    """Returns whether a flow run that Prefect does not know was this Prefect's.

    Machines may share MLflow and the bucket only. Their own Prefects all have an address of the loopback interface,
    which does not tell them apart.
    """
    if not address:
        return True
    return address == page_of(flow_run) and urlsplit(address).hostname not in LOOPBACK


def close_run(run_id: str, of: str | None = None) -> bool:
    """Closes the MLflow run of a flow whose process was killed, and its flow run; returns whether it was still open.

    Args:
        of: id of the flow run whose process was killed; the MLflow run stays open if another one works on it now.
    """
    flow_run_id = mlflow_runs.run_tags(run_id).get(FLOW_RUN, "")
    lock, held = lock_file(run_id), False
    if of not in (None, flow_run_id):
        return False
    try:
        with try_locked(lock) as held:  # a resume at the same moment waits, or was faster
            tags = mlflow_runs.run_tags(run_id)
            ours = _is_of_a_flow(run_id, tags) and tags.get(FLOW_RUN, "") == flow_run_id
            if not held or not ours or mlflow_runs.run_status(run_id) != "RUNNING":
                return False
            mark_dead(flow_run_id)
            Board(open_bucket(), run_id).clear()  # else nodes would join it before others
            mlflow_runs.end_run(run_id, "KILLED")
    except Exception:
        if held:
            lock.write_text(flow_run_id)  # so that the next check finds it dead again
        raise
    return True


def _flow_runs() -> Iterator[tuple[str, str]]:
    for killed in killed_flow_runs():
        if killed.state_type not in TERMINAL_STATES:
            why = f"Prefect says that flow run {killed.name} is {killed.state_name}, but its process was killed"
            yield str(killed.id), why


def _end_flow_run(what: str) -> bool:
    mark_dead(what)
    return True


def _leases() -> Iterator[tuple[str, str]]:
    for limit in forgotten_leases():
        yield limit, "Prefect says that it is taken, but no flow run holds it"


def _uploads(store: ObjectStore, young: datetime) -> Iterator[tuple[str, str]]:
    for upload in store.uploads():
        if upload.begun < young:
            yield f"{upload.key} {upload.id}", f"begun {upload.begun:%Y-%m-%d %H:%M} UTC and never completed"


def _abort(store: ObjectStore, what: str) -> bool:
    for upload in store.uploads():
        if what == f"{upload.key} {upload.id}":
            store.abort_upload(upload)
    return True


def _checkpoints(store: ObjectStore, young: datetime) -> Iterator[tuple[str, str]]:
    found: dict[str, list[ObjectInfo]] = {}
    for info in store.list(bucket_layout.RUNS):
        if bucket_layout.part(info.key, 2) == "checkpoints":
            found.setdefault(info.key.rpartition("/")[0] + "/", []).append(info)
    for prefix, files in found.items():
        if _is_abandoned(files, young):
            yield prefix, f"{counted(len(files), 'file')} without a commit, which cannot be used"


def _is_abandoned(files: Sequence[ObjectInfo], young: datetime) -> bool:
    """Returns whether these files of a checkpoint have no commit, and are too old for a process to write one."""
    committed = any(info.key.endswith(f"/{COMMIT}") for info in files)
    return not committed and all(info.modified and info.modified < young for info in files)


def _delete_checkpoint(store: ObjectStore, prefix: str, young: datetime) -> bool:
    files = list(store.list(prefix))
    # Checked again: a training that was resumed since then writes the same steps under the same keys.
    if is_held(lock_file(bucket_layout.part(prefix, 1))) or not _is_abandoned(files, young):
        return False
    for info in files:
        store.delete(info.key)
    return True


def _aliases(store: ObjectStore) -> Iterator[tuple[str, str]]:
    names = names_with_history(store)
    for name, wrong in zip(names, in_parallel(partial(misplaced_aliases, store), names), strict=True):
        if wrong:
            yield name, f"its aliases are not where its history says ({'; '.join(wrong)})"


def _work() -> Iterator[tuple[str, str]]:
    for folder in (Settings().home / "work").glob("*"):
        if not is_held(_work_lock(folder)):
            yield str(folder), "half-written by a step that was killed"


def _remove_work(what: str) -> bool:
    with try_locked(_work_lock(Path(what))) as held:
        if held:
            shutil.rmtree(what, ignore_errors=True)
    return held


def _work_lock(folder: Path) -> Path:
    """Returns the lock of the step that works in the folder."""
    return Settings().cache / "locks" / folder.name
