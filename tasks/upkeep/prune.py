"""Retention: what may go of what trainings leave behind, and letting it go, the commits first.

A dataset's shards and raw files are shared between versions, so they go only when no kept manifest or record names
them. A training that prepares its data may rely on what is there already, before MLflow shows that it does: while such
a training runs, no data are removed, and one that begins meanwhile waits (`tasks.data.prune_mark`).
"""

import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from prefect import get_client
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import StateType
from pydantic import ValidationError
from rich.filesize import decimal

from infra.machine.threads import in_parallel
from infra.records import Record
from infra.settings import Settings
from infra.sources.raw_data import RawSource
from infra.storage import bucket_layout
from infra.storage.bucket_layout import COMMIT
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
from tasks.training.runs.lineage import RecordDamaged, run_lineage
from tasks.upkeep.in_use import References, references

PREPARATION = timedelta(days=7)  # longer than any; a flow run that is said to run, but was killed, is passed over then


class Freed(Record):
    """What went of one kind, or would go."""

    kind: str
    count: int
    """Objects or files."""

    bytes: int


class Pruned(Record):
    """What went, or would go in a dry run."""

    dry_run: bool
    freed: tuple[Freed, ...]
    """Kinds of which there was something."""

    notes: tuple[str, ...] = ()
    """What was left alone, and why."""

    def markdown(self) -> str:
        """As a page."""
        rows = [f"| {each.kind} | {each.count:,} | {decimal(each.bytes)} |" for each in self.freed]
        table = ["| what | objects | size |", "|:--|--:|--:|", *rows] if rows else ["Nothing was old enough to go."]
        title = "Would be removed" if self.dry_run else "Removed"
        return "\n".join([f"**{title}**", "", *table, *(f"\n{note}" for note in self.notes)])


@dataclass(frozen=True)
class _Batch:
    """Objects of one kind; the commits go before what they commit."""

    kind: str
    commits: Sequence[ObjectInfo]
    contents: Sequence[ObjectInfo] = ()
    is_data: bool = False
    """A training that prepares its data may be about to rely on them."""


@step("prune", retried=False)
def prune(config: RetentionConfig, *, dry_run: bool = False, forget_unknown: bool = False) -> Pruned:
    """Remove what nothing rests on and is older than its age, from the bucket and from this machine.

    Args:
        forget_unknown: go on if MLflow does not know runs or promoted versions of which the bucket holds data.

    Raises:
        ServiceError: a server failed, or something that says what is needed is damaged; what went until then is gone,
            and nothing is half there.
    """
    settings = Settings()
    store = open_bucket()
    mark: AbstractContextManager[Callable[[], None]] = nullcontext(lambda: None) if dry_run else marked(store)
    with mark as check:
        under_way = trainings_under_way()  # those that begin from now on wait
        objects = list(store.list(""))  # before it is asked what is needed: what comes later is not looked at
        stored = {bucket_layout.part(info.key, 1) for info in objects if info.key.startswith(bucket_layout.RUNS)}
        needed = references(store, stored, forget_unknown=forget_unknown)
        busy = not under_way <= needed.flow_runs  # one without an MLflow run may be preparing its data
        notes = ("Data were left alone: a training is preparing its own; try again later.",) if busy else ()
        freed = []
        for batch in _Planner(store, objects, needed, config).batches():
            if batch.is_data and busy:
                continue
            if not dry_run:
                check()
                _delete(store, batch.commits)
                _delete(store, batch.contents)
            gone = [*batch.commits, *batch.contents]
            freed.append(Freed(kind=batch.kind, count=len(gone), bytes=sum(info.size for info in gone)))
    freed += _prune_machine(settings, needed, config, dry_run=dry_run)
    result = Pruned(dry_run=dry_run, freed=tuple(each for each in freed if each.count), notes=notes)
    create_markdown_artifact(result.markdown(), key="prune", description="What was removed")
    for each in result.freed:
        run_logger().info("%s: %d, %s", each.kind, each.count, decimal(each.bytes))
    return result


def trainings_under_way() -> set[str]:
    """Returns the flow runs of trainings that Prefect says are running or about to run."""
    since = datetime.now(UTC) - PREPARATION
    with get_client(sync_client=True) as client:
        found = training_flow_runs(client, [StateType.RUNNING, StateType.PENDING], after=since)
        return {str(run.id) for run in found}


class _Planner:
    """Decides what of a listing may go."""

    def __init__(
        self, store: ObjectStore, objects: Sequence[ObjectInfo], needed: References, config: RetentionConfig
    ) -> None:
        self._store, self._needed, self._config = store, needed, config
        self._now = datetime.now(UTC)
        self._objects: dict[str, list[ObjectInfo]] = {}
        for info in objects:
            self._objects.setdefault(info.key.partition("/")[0], []).append(info)
        self._runs: dict[str, list[ObjectInfo]] = {}
        for info in self._objects.get("runs", ()):
            self._runs.setdefault(bucket_layout.part(info.key, 1), []).append(info)

    def batches(self) -> list[_Batch]:
        """In the order in which they may go."""
        checkpoints, outputs = self._checkpoints(), self._outputs()
        gone = {info.key for info in [*checkpoints.commits, *checkpoints.contents, *outputs.commits, *outputs.contents]}
        kept = self._needs_of_kept(gone)
        journals, stale, manifests, shards = self._datasets(kept)
        reports = self._reports()
        gone |= {info.key for info in manifests}
        sources, raw = self._raw(kept, gone)
        weights = {bucket_layout.pretrained_weights(need.pretrained_sha256) for need in kept if need.pretrained_sha256}
        starts = [info for info in self._old("pretrained", self._config.raw_days) if info.key not in weights]
        return [
            checkpoints,
            outputs,
            _Batch("interrupted preprocessing", journals, is_data=True),
            _Batch("records of preprocessing", stale, is_data=True),
            _Batch("dataset versions", manifests, is_data=True),
            _Batch("shards", shards, is_data=True),
            _Batch("data reports", *_commits_first(reports, "data.json")),
            _Batch("records of sources", sources, is_data=True),
            _Batch("listings of folders", self._old("listings", self._config.raw_days), is_data=True),
            _Batch("raw files", raw, is_data=True),
            _Batch("weights to start from", starts, is_data=True),
        ]

    def _age(self, info: ObjectInfo) -> float:
        """In days."""
        assert info.modified is not None
        return (self._now - info.modified) / timedelta(days=1)

    def _is_old(self, info: ObjectInfo, days: float) -> bool:
        return self._age(info) > max(days, self._config.grace_days)

    def _old(self, top: str, days: float) -> list[ObjectInfo]:
        return [info for info in self._objects.get(top, ()) if self._is_old(info, days)]

    def _checkpoints(self) -> _Batch:
        """All of a run, once its newest is old."""
        gone: list[ObjectInfo] = []
        for run_id, objects in self._runs.items():
            finished = self._needed.statuses.get(run_id) == "FINISHED"
            days = self._config.finished_checkpoints_days if finished else self._config.unfinished_checkpoints_days
            found = [info for info in objects if _is_checkpoint(info)]
            if run_id not in self._needed.running and all(self._is_old(info, days) for info in found):
                gone += found
        return _Batch("checkpoints", *_commits_first(gone, COMMIT))

    def _outputs(self) -> _Batch:
        """All else of a run that no version came of; its checkpoints have to go before, or with it."""
        config = self._config
        days = max(config.runs_days, config.unfinished_checkpoints_days, config.finished_checkpoints_days)
        gone: list[ObjectInfo] = []
        for run_id, objects in self._runs.items():
            kept = run_id in self._needed.running | self._needed.in_force | self._needed.registered
            if not kept and all(self._is_old(info, days) for info in objects):
                gone += [info for info in objects if not _is_checkpoint(info)]
        return _Batch("unregistered trainings", *_commits_first(gone, COMMIT))

    def _needs_of_kept(self, gone: set[str]) -> list[Lineage]:
        """Of the runs at work and in force, and of those that can be resumed."""
        resumable = [
            run_id
            for run_id, objects in self._runs.items()
            if self._needed.statuses.get(run_id) != "FINISHED"
            and any(_is_checkpoint(info) and info.key not in gone for info in objects)
        ]
        return [*self._needed.lineages, *(run_lineage(self._store, run_id) for run_id in resumable)]

    def _datasets(
        self, kept_needs: Sequence[Lineage]
    ) -> tuple[list[ObjectInfo], list[ObjectInfo], list[ObjectInfo], list[ObjectInfo]]:
        """Journals, step records, manifests and shards that may go."""
        config = self._config
        journals, kept_journals = self._journals()
        manifests = sorted(self._objects.get("datasets", ()), key=self._age)
        in_use = self._needed.datasets | {need.dataset_version for need in kept_needs}
        going = [
            info
            for info in manifests[config.datasets_keep :]
            if self._is_old(info, config.datasets_days) and _version(info) not in in_use
        ]
        gone = {info.key for info in going}
        named = self._shards_of_kept([info for info in manifests if info.key not in gone])
        named |= {bucket_layout.shard(packed.shard.sha256) for packed in noted_shards(self._store, kept_journals)}
        shards = [info for info in self._old("shards", 0) if info.key not in named]
        left = {info.key for info in manifests} - gone
        steps = [
            info
            for info in self._old("steps", 0)
            if self._is_old(info, config.steps_days) or self._manifest_of_step(info) not in left
        ]
        return journals, steps, going, shards

    def _journals(self) -> tuple[list[ObjectInfo], list[str]]:
        """All of an interrupted step, once its newest entry is old; and the keys of what stays."""
        steps: dict[str, list[ObjectInfo]] = {}
        for info in self._objects.get("journals", ()):
            steps.setdefault(bucket_layout.part(info.key, 1), []).append(info)
        going: list[ObjectInfo] = []
        for objects in steps.values():
            if all(self._is_old(info, self._config.journals_days) for info in objects):
                going += objects
        gone = {info.key for info in going}
        return going, [info.key for objects in steps.values() for info in objects if info.key not in gone]

    def _shards_of_kept(self, manifests: Iterable[ObjectInfo]) -> set[str]:
        named: set[str] = set()
        for info in manifests:
            try:
                manifest = load_manifest(self._store, _version(info))
            except (ObjectMissing, DatasetDamaged) as error:
                # One that is no use to anybody names nothing; but one that a run needs, people may want to mend.
                if _version(info) in self._needed.datasets:
                    raise
                run_logger().warning("%s", error)
                continue
            named |= {bucket_layout.shard(shard.sha256) for shard in shards_of(manifest)}
        return named

    def _manifest_of_step(self, info: ObjectInfo) -> str | None:
        try:
            record = StepRecord.model_validate_json(self._store.get_bytes(info.key))
        except (ObjectMissing, ValidationError):
            return None
        return bucket_layout.dataset_manifest(record.dataset_version)

    def _reports(self) -> list[ObjectInfo]:
        old = self._old("reports", self._config.reports_days)
        return [info for info in old if not self._needed.datasets.intersection(info.key.split("/"))]

    def _raw(self, kept_needs: Sequence[Lineage], gone: set[str]) -> tuple[list[ObjectInfo], list[ObjectInfo]]:
        """Records of sources, and raw files, that may go.

        A dataset is found by the name that its source gave it, which runs tell; one that no run has used yet may be
        of any source, so all are kept until it is older than raw data are to become.
        """
        manifests = {_version(info): info for info in self._objects.get("datasets", ()) if info.key not in gone}
        names = self._names_of(manifests, gone)
        unused = [info for version, info in manifests.items() if version not in names]
        if any(not self._is_old(info, self._config.raw_days) for info in unused):
            run_logger().info("raw data are kept: it is not known yet what a new dataset version was made of")
            return [], []
        needed = {need.dataset_name for need in kept_needs} | set(names.values())
        sources, named = [], set()
        for info in self._objects.get("sources", ()):
            old = self._is_old(info, self._config.raw_days)
            try:
                source = RawSource.model_validate_json(self._store.get_bytes(info.key))
            except (ObjectMissing, ValidationError):  # nobody can use it
                if old:
                    sources.append(info)
                continue
            if old and source.name not in needed:
                sources.append(info)
            else:
                named |= {file.key for file in source.files}
        return sources, [info for info in self._old("raw", 0) if info.key not in named]

    def _names_of(self, versions: Iterable[str], gone: set[str]) -> dict[str, str]:
        """Names of dataset versions, by what the runs say that stay."""
        names: dict[str, str] = {}
        for run_id, objects in self._runs.items():
            if not any(info.key.endswith(f"{run_id}/run.json") and info.key not in gone for info in objects):
                continue
            try:
                need = run_lineage(self._store, run_id)
            except RecordDamaged as error:
                run_logger().warning("%s", error)
                continue
            if need.dataset_version and need.dataset_name:
                names[need.dataset_version] = need.dataset_name
        return {version: names[version] for version in versions if version in names}


def _is_checkpoint(info: ObjectInfo) -> bool:
    return bucket_layout.part(info.key, 2) == "checkpoints"


def _version(info: ObjectInfo) -> str:
    """Returns the dataset version of a manifest."""
    return bucket_layout.part(info.key, 1)


def _commits_first(objects: Sequence[ObjectInfo], commit: str) -> tuple[list[ObjectInfo], list[ObjectInfo]]:
    commits = [info for info in objects if info.key.endswith(f"/{commit}")]
    return commits, [info for info in objects if not info.key.endswith(f"/{commit}")]


def _delete(store: ObjectStore, objects: Iterable[ObjectInfo]) -> None:
    in_parallel(lambda info: store.delete(info.key), objects)


def _prune_machine(settings: Settings, needed: References, config: RetentionConfig, *, dry_run: bool) -> list[Freed]:
    """Cached files, and folders of trainings that have ended."""
    before = time.time() - 86_400 * max(config.cache_days, config.grace_days)
    cached = [file for file in settings.cache.glob("[0-9a-f][0-9a-f]/*") if file.is_file() and _used(file) < before]
    folders = [
        folder
        for folder in settings.runs.glob("*")
        if folder.is_dir()
        and folder.name not in needed.running
        and all(file.stat().st_mtime < before for file in (folder, *folder.iterdir()))
    ]
    kinds: list[tuple[str, list[Path], Callable[[Path], object]]] = [
        ("cached files", cached, lambda file: file.unlink(missing_ok=True)),
        ("folders of trainings", folders, shutil.rmtree),
    ]
    freed = []
    for kind, paths, remove in kinds:
        size = sum(_size(path) for path in paths)
        if not dry_run:
            for path in paths:
                remove(path)
        freed.append(Freed(kind=kind, count=len(paths), bytes=size))
    return freed


def _used(file: Path) -> float:
    status = file.stat()
    return max(status.st_atime, status.st_mtime)


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
