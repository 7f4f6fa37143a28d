"""The prune task: removes old objects and files that are not in use, commits first.

Dataset versions share shards and raw files, so these are removed only when no kept manifest or record names them. A
training that prepares its data may use existing data before MLflow shows it: while such a training runs, no data are
removed, and a training that begins during a prune waits (`tasks.data.prune_mark`).
"""

import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Set
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from stat import S_ISREG
from typing import TypeVar

from prefect import get_client
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import StateType
from pydantic import BaseModel
from rich.filesize import decimal

from infra.machine.threads import in_parallel
from infra.records import Record
from infra.settings import Settings
from infra.sources.raw_data import RawSource
from infra.storage import bucket_layout
from infra.storage.bucket_layout import COMMIT
from infra.storage.cache_limit import ABANDONED_SECONDS
from infra.storage.object_store import ObjectInfo, ObjectStore, open_bucket
from infra.storage.s3_client import ObjectMissing
from infra.tracking.promotion_history import Lineage
from tasks.config.retention import RetentionConfig
from tasks.data.dataset import DatasetDamaged, load_manifest, shards_of
from tasks.data.preprocess import StepRecord
from tasks.data.preprocessing_journal import noted_shards
from tasks.data.prune_mark import marked
from tasks.orchestration.flow_runs import training_flow_runs
from tasks.orchestration.progress import run_logger
from tasks.orchestration.step import step
from tasks.reporting.markdown import table
from tasks.training.runs.lineage import RecordDamaged, run_lineage
from tasks.upkeep.in_use import References, references

M = TypeVar("M", bound=BaseModel)

MAX_PREPARATION = timedelta(days=7)  # of a training's data; an older flow run that seems to run was killed


class Freed(Record):
    """What was removed of one kind, or would be."""

    kind: str
    count: int
    """Objects or files."""

    bytes: int


class Pruned(Record):
    """What was removed, or would be in a dry run."""

    dry_run: bool
    freed: tuple[Freed, ...]
    """Kinds with at least one object or file."""

    notes: tuple[str, ...] = ()
    """What was kept, and why."""

    def markdown(self) -> str:
        """Returns it as a page."""
        rows = [(each.kind, each.count, decimal(each.bytes)) for each in self.freed]
        found = table(("what", "objects", "size"), rows, "lrr") if rows else ["Nothing was old enough to be removed."]
        title = "Would be removed" if self.dry_run else "Removed"
        return "\n".join([f"**{title}**", "", *found, *(f"\n{note}" for note in self.notes)])


@dataclass(frozen=True)
class _Rule:
    """When objects under a prefix are removed; commits are removed before what they commit."""

    prefix: str
    ages: tuple[str, ...] = ()
    """Fields of `RetentionConfig`, of which the longest counts; `grace_days` counts always."""

    group: int | None = None
    """The part of the key that names a group, which is kept while one object is young; None: the whole key."""

    commit: str = ""
    is_data: bool = True
    """Whether a training that prepares its data may be about to use them."""


UNFINISHED, FINISHED = ("unfinished_checkpoints_days",), ("finished_checkpoints_days",)

SWEPT = {
    "checkpoints": _Rule(bucket_layout.RUNS, UNFINISHED, group=1, commit=COMMIT, is_data=False),
    "unregistered trainings": _Rule(
        bucket_layout.RUNS, ("runs_days", *UNFINISHED, *FINISHED), group=1, commit=COMMIT, is_data=False
    ),
    "interrupted preprocessing": _Rule(bucket_layout.JOURNALS, ("journals_days",), group=1),
    "records of preprocessing": _Rule(bucket_layout.STEPS),  # removed with their versions, or after `steps_days`
    "dataset versions": _Rule(bucket_layout.DATASETS, ("datasets_days",), group=1, commit="manifest.json"),
    "shards": _Rule(bucket_layout.SHARDS),
    "data reports": _Rule(bucket_layout.REPORTS, ("reports_days",), group=2, commit="data.json", is_data=False),
    "records of sources": _Rule(bucket_layout.SOURCES, ("raw_days",)),
    "listings of folders": _Rule(bucket_layout.LISTINGS, ("raw_days",)),
    "raw files": _Rule(bucket_layout.RAW),
    "weights to start from": _Rule(bucket_layout.PRETRAINED, ("raw_days",)),
}
"""Kinds of objects, in the order of their removal; marked objects are kept."""


@step("prune", retried=False)
def prune(config: RetentionConfig, *, dry_run: bool = False, forget_unknown: bool = False) -> Pruned:
    """Removes old objects that are not in use from the bucket, and old files from this machine.

    Args:
        forget_unknown: continue if MLflow does not know runs or promoted versions of which the bucket holds data.

    Raises:
        ServiceError: a server failed, or a record of what is in use is damaged. Objects removed before stay removed;
            nothing is half removed.
    """
    settings = Settings()
    store = open_bucket()
    mark: AbstractContextManager[Callable[[], None]] = nullcontext(lambda: None) if dry_run else marked(store)
    with mark as check:
        active = active_trainings()  # trainings that begin from now on wait
        prefixes = sorted({rule.prefix for rule in SWEPT.values()})
        # Listed before references are read: later objects are not considered.
        objects = [info for prefix in prefixes for info in store.list(prefix)]
        stored = {bucket_layout.part(info.key, 1) for info in objects if info.key.startswith(bucket_layout.RUNS)}
        needed = references(store, stored, resumed_runs(), forget_unknown=forget_unknown)
        busy = not active <= needed.flow_runs  # a training without an MLflow run may be preparing its data
        notes = ("Data were kept: a training is preparing its own; try again later.",) if busy else ()
        freed = []
        marks = _Marks(store, objects, needed, config)
        for kind, rule in SWEPT.items():
            unmarked = [] if rule.is_data and busy else marks.unmarked(kind)
            for commits in () if dry_run else (True, False):
                check()
                deleted = [info for info in unmarked if info.key.endswith(f"/{rule.commit}") is commits]
                in_parallel(lambda info: store.delete(info.key), deleted)
            freed.append(Freed(kind=kind, count=len(unmarked), bytes=sum(info.size for info in unmarked)))
    freed += _prune_machine(settings, needed, config, dry_run=dry_run)
    result = Pruned(dry_run=dry_run, freed=tuple(each for each in freed if each.count), notes=notes)
    create_markdown_artifact(result.markdown(), key="prune", description="What was removed")
    for each in result.freed:
        run_logger().info("%s: %d, %s", each.kind, each.count, decimal(each.bytes))
    return result


def active_trainings() -> set[str]:
    """Returns the flow runs of trainings that are pending or running in Prefect, and became so lately."""
    now = datetime.now(UTC)
    with get_client(sync_client=True) as client:
        found = training_flow_runs(client, [StateType.RUNNING, StateType.PENDING])
        begun = {str(run.id): run.start_time or (run.state.timestamp if run.state else now) for run in found}
    return {run_id for run_id, moment in begun.items() if moment >= now - MAX_PREPARATION}


def resumed_runs() -> set[str]:
    """Returns the MLflow runs of trainings and sweeps that a flow run is to go on with.

    It may wait for a worker, or for the model's lease.
    """
    with get_client(sync_client=True) as client:
        found = training_flow_runs(client, [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING])
        asked = [each for run in found for each in (run.parameters, run.parameters.get("sweep"))]
        return {str(each["resume"]) for each in asked if isinstance(each, dict) and each.get("resume")}


class _Marks:
    """Marks objects that are in use or young, and all objects that these name."""

    def __init__(
        self, store: ObjectStore, objects: Iterable[ObjectInfo], needed: References, config: RetentionConfig
    ) -> None:
        self._store, self._needed, self._config = store, needed, config
        self._now = datetime.now(UTC)
        self._marked: set[str] = set()
        self._objects: dict[str, list[ObjectInfo]] = {kind: [] for kind in SWEPT}
        kinds = {rule.prefix: kind for kind, rule in SWEPT.items()}
        for info in objects:
            if kind := kinds.get(info.key.partition("/")[0] + "/"):
                is_checkpoint = kind == "unregistered trainings" and bucket_layout.part(info.key, 2) == "checkpoints"
                self._objects["checkpoints" if is_checkpoint else kind].append(info)
        lineages = self._mark_runs()
        in_use = needed.datasets | {lineage.dataset_version or "" for lineage in lineages}
        self._mark_raw(lineages, self._mark_datasets(in_use))
        self._mark("data reports", in_use)
        weights = {each.pretrained_sha256 for each in lineages if each.pretrained_sha256}
        self._mark("weights to start from", {bucket_layout.pretrained_weights(each) for each in weights})
        self._mark("listings of folders")

    def unmarked(self, kind: str) -> list[ObjectInfo]:
        return [info for info in self._objects[kind] if info.key not in self._marked]

    def _mark(self, kind: str, named: Container[str] = ()) -> set[str]:
        """Marks the objects of each group that is named or young; returns the groups."""
        part, kept = SWEPT[kind].group, set[str]()
        groups: dict[str, list[ObjectInfo]] = defaultdict(list)
        for info in self._objects[kind]:
            groups[info.key if part is None else bucket_layout.part(info.key, part)].append(info)
        for group, objects in groups.items():
            finished = kind == "checkpoints" and self._needed.statuses.get(group) == "FINISHED"
            ages = FINISHED if finished else SWEPT[kind].ages
            if group in named or any(self._is_young(info, *ages) for info in objects):
                self._marked |= {info.key for info in objects}
                kept.add(group)
        return kept

    def _is_young(self, info: ObjectInfo, *ages: str) -> bool:
        days = max(getattr(self._config, age) for age in ("grace_days", *ages))
        return bool((self._now - _written(info)) / timedelta(days=1) <= days)

    def _mark_runs(self) -> list[Lineage]:
        """Marks the runs that are running, in force, registered or resumable; returns the lineages of those in use."""
        needed = self._needed
        checkpoints = self._mark("checkpoints", needed.running)
        self._mark("unregistered trainings", needed.running | needed.in_force | needed.registered | checkpoints)
        resumable = [run_id for run_id in checkpoints if needed.statuses.get(run_id) != "FINISHED"]
        return [*needed.lineages, *(run_lineage(self._store, run_id) for run_id in resumable)]

    def _mark_datasets(self, in_use: Set[str]) -> set[str]:
        """Marks versions, journals and the shards of both; returns the versions."""
        manifests = (info for info in self._objects["dataset versions"] if info.key.endswith("/manifest.json"))
        newest = sorted(manifests, key=_written, reverse=True)[: self._config.datasets_keep]
        versions = self._mark("dataset versions", in_use | {bucket_layout.part(info.key, 1) for info in newest})
        self._mark("interrupted preprocessing")
        journals = (info.key for info in self._objects["interrupted preprocessing"] if info.key in self._marked)
        shards = [packed.shard for packed in noted_shards(self._store, journals)]
        for version in versions:
            try:
                shards += shards_of(load_manifest(self._store, version))
            except (ObjectMissing, DatasetDamaged) as error:
                # A damaged version that no run needs is ignored; one that a run needs may have to be repaired.
                if version in self._needed.datasets:
                    raise
                run_logger().warning("%s", error)
        self._mark("shards", {bucket_layout.shard(shard.sha256) for shard in shards})
        return versions

    def _mark_raw(self, lineages: Iterable[Lineage], versions: Set[str]) -> None:
        """Marks records of preprocessing, and the sources and raw files that the dataset versions were made of.

        Records of older code do not name the source. It is found by the dataset name in the records of runs. A version
        that no run has used yet may be of any source, so all sources are kept until it is older than `raw_days`.
        """
        steps = [
            (info, record)
            for info, record in self._read("records of preprocessing", StepRecord)
            if record.dataset_version in versions and self._is_young(info, "steps_days")
        ]
        self._mark("records of preprocessing", {info.key for info, _ in steps})
        sourceless = {record.dataset_version for _, record in steps if not record.raw}
        unknown = versions - ({record.dataset_version for _, record in steps} - sourceless)
        names = self._names(unknown)
        unused = {bucket_layout.dataset_manifest(version) for version in unknown - {used for used, _ in names}}
        if any(info.key in unused and self._is_young(info, "raw_days") for info in self._objects["dataset versions"]):
            run_logger().info("raw data are kept: the source of a new dataset version is not known yet")
            self._marked |= {info.key for kind in ("records of sources", "raw files") for info in self._objects[kind]}
            return
        in_use = {record.raw for _, record in steps} | {name for _, name in names}
        in_use |= {each.dataset_name for each in lineages if each.dataset_version not in versions - unknown}
        sources = list(self._read("records of sources", RawSource))
        self._mark("records of sources", {info.key for info, it in sources if in_use & {it.digest, it.name}})
        self._mark(
            "raw files", {file.key for info, it in sources if info.key in self._marked for file in it.stored_files}
        )

    def _names(self, versions: Set[str]) -> set[tuple[str, str]]:
        """Returns dataset versions with their names in the records of kept runs."""
        runs = {bucket_layout.part(info.key, 1) for info in self._objects["unregistered trainings"]} if versions else ()
        names = set()
        for run_id in runs:
            if bucket_layout.run_record(run_id) in self._marked:
                try:
                    need = run_lineage(self._store, run_id)
                except RecordDamaged as error:
                    run_logger().warning("%s", error)
                    continue
                if need.dataset_version and need.dataset_name and need.dataset_version in versions:
                    names.add((need.dataset_version, need.dataset_name))
        return names

    def _read(self, kind: str, model: type[M]) -> Iterator[tuple[ObjectInfo, M]]:
        """Yields the records of a kind, without damaged ones, which cannot be used."""
        for info in self._objects[kind]:
            if record := self._store.read_record(info.key, model):
                yield info, record


def _written(info: ObjectInfo) -> datetime:
    assert info.modified is not None
    return info.modified


def _prune_machine(settings: Settings, needed: References, config: RetentionConfig, *, dry_run: bool) -> list[Freed]:
    """Removes cached files, and folders of trainings that have ended."""
    before = time.time() - 86_400 * max(config.cache_days, config.grace_days)
    abandoned = min(before, time.time() - ABANDONED_SECONDS)
    cached = [
        file
        for pattern, limit in (("[0-9a-f][0-9a-f]/*", before), (".*.part", abandoned), ("partial/*", abandoned))
        for file in settings.cache.glob(pattern)
        if file.suffix != ".lock" and _is_old_file(file, limit)
    ]
    folders = [
        folder
        for folder in settings.runs.glob("*")
        if folder.name not in needed.running and _is_old_folder(folder, before)
    ]
    freed = []
    for kind, paths in (("cached files", cached), ("folders of trainings", folders)):
        freed.append(Freed(kind=kind, count=len(paths), bytes=sum(map(_size, paths))))
        for path in () if dry_run else paths:
            if path.is_dir():
                with suppress(FileNotFoundError):  # another process removes it, too
                    shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    return freed


# Other processes remove files and folders at the same time.


def _is_old_file(file: Path, before: float) -> bool:
    try:
        status = file.stat()
    except FileNotFoundError:
        return False
    return S_ISREG(status.st_mode) and max(status.st_atime, status.st_mtime) < before


def _is_old_folder(folder: Path, before: float) -> bool:
    try:
        return folder.is_dir() and all(file.stat().st_mtime < before for file in (folder, *folder.iterdir()))
    except FileNotFoundError:
        return False


def _size(path: Path) -> int:
    try:
        return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
    except FileNotFoundError:
        return 0
