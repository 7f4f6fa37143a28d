"""The preprocess task: packs raw files in the bucket into a dataset version there, or finds an existing one."""

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

from cnn.code_digest import code_digest
from cnn.config.preprocessing import MAX_DEFAULT_SIZE, PreprocessConfig
from cnn.data.manifest import Manifest, canonical_json
from cnn.errors import InputError
from cnn.formats import open_source
from cnn.formats.decode import decoder_versions
from cnn.formats.files import Files
from cnn.formats.layout import LeftOut
from cnn.preprocessing.pack import Packed, code_files, pack
from cnn.preprocessing.survey import Plan, retarget, survey
from infra.machine.locks import locked
from infra.machine.threads import in_parallel
from infra.records import Record
from infra.settings import Settings
from infra.sources.label_table import LabelTable
from infra.sources.labelled import open_location
from infra.sources.listing import Listing
from infra.sources.location import ListedFiles
from infra.sources.raw_data import ListingRef, RawSource
from infra.storage import bucket_layout
from infra.storage.cache import Cache
from infra.storage.object_store import ObjectStore, open_bucket
from tasks.data.dataset import DatasetRef, is_complete, load_manifest, open_cache
from tasks.data.image_index import read_index_record, replace_columns, store_index, write_index
from tasks.data.label_tables import given_by
from tasks.data.preprocessing_journal import Journal
from tasks.data.shard_uploads import ShardStore, fits_cache
from tasks.orchestration.cancellation import stop_if_cancelled
from tasks.orchestration.progress import progress, run_logger
from tasks.orchestration.step import step

INDEX = "index.parquet"


class StepRecord(Record, extra="forbid"):
    """The dataset version that a preprocessing made of its input."""

    dataset_version: str
    raw: str | None = None
    """`RawSource.digest` of the input; None if older code wrote the record."""


@step("preprocess")
def preprocess(
    raw: RawSource, config: PreprocessConfig, *, max_default_size: int = MAX_DEFAULT_SIZE, refresh: bool = False
) -> DatasetRef:
    """Packs a source into a dataset version, unless that was done before.

    Work of an interrupted run, on any machine, is reused; see `tasks.data.preprocessing_journal`.

    Args:
        max_default_size: see `cnn.preprocessing.survey.survey`.
        refresh: compute and store everything again.

    Raises:
        InputError: the images cannot be used.
        UsageError: a file of a folder that is read in place has changed.
        ServiceError: the object store failed.
    """
    stop_if_cancelled()
    settings = Settings()
    store = open_bucket(create=True)
    cache = Cache(settings.cache, store)
    key = step_key(raw, config, max_default_size)
    lock = settings.cache / "locks" / f"preprocess-{key}"
    with _cache_limited_afterwards(settings, store), locked(lock):  # a process that waits here finds the result
        labels = _labels(raw, cache)
        if not refresh and (version := _find(store, key)) and _renew_columns(store, version, raw, labels):
            _warn(raw.name, load_manifest(store, version))
            return DatasetRef(version=version, name=raw.name, reused=True)
        journals = Journal(store, key), Journal(store, f"{key}-again")
        if refresh:
            _clear(journals)
        files = _in_place(raw.listing, cache) if raw.listing else _fetch(raw, cache)
        with _workspace(settings.home / "work" / f"preprocess-{key}") as out:
            try:
                manifest = _pack(
                    raw, files, labels, config, out, cache, journals, max_default_size=max_default_size, refresh=refresh
                )
            except InputError as error:
                raise InputError(f"{raw.name}: {error}") from error
            version = manifest.version
            record = StepRecord(dataset_version=version, raw=raw.digest)
            _commit(store, bucket_layout.dataset_manifest(version), manifest.to_bytes())
            store_index(store, version, out / INDEX, raw.labels.file.sha256 if raw.labels else None)
        _commit(store, bucket_layout.preprocess_record(key), record.model_dump_json().encode())
        _clear(journals)
    _log_summary(raw.name, manifest)
    return DatasetRef(version=version, name=raw.name)


def step_key(raw: RawSource, config: PreprocessConfig, max_default_size: int = MAX_DEFAULT_SIZE) -> str:
    """Returns a digest of all that decides the result: raw data, parameters, code and image decoders."""
    # The place of a file makes no difference; `raw.digest` covers what is read from a label table.
    parameters = config.model_dump(mode="json", exclude={"keep_raw", "columns", "group", "slices"})
    # Without these keys, steps keep the digest that they had before the keys existed.
    if config.resize == "crop":
        del parameters["resize"]
    if config.image_size is None and max_default_size != MAX_DEFAULT_SIZE:
        parameters["max_default_size"] = max_default_size
    content = {
        "raw": raw.digest,
        "classes": raw.classes,
        "config": parameters,
        "code": code_digest(code_files()),
        "decoders": decoder_versions(),
    }
    return hashlib.sha256(canonical_json(content)).hexdigest()


def _find(store: ObjectStore, step: str) -> str | None:
    """Returns the dataset version of an earlier run, if the bucket still has all of it."""
    record = store.read_record(bucket_layout.preprocess_record(step), StepRecord)
    return record.dataset_version if record and is_complete(store, record.dataset_version) else None


def _labels(raw: RawSource, cache: Cache) -> LabelTable | None:
    if raw.labels is None:
        return None
    return LabelTable.load(cache.fetch(raw.labels.file.key, raw.labels.file.sha256))


def _renew_columns(store: ObjectStore, version: str, raw: RawSource, labels: LabelTable | None) -> bool:
    """Gives the index of a version that exists the present groups and columns of the label table, if there is one.

    Returns:
        Whether the index is of this source now; if not, the images must be packed again.
    """
    sha256 = raw.labels.file.sha256 if raw.labels else None
    record = read_index_record(store, version)
    if record is None:
        return sha256 is None  # code without an index made the version
    return record.labels == sha256 or replace_columns(store, version, labels, sha256)


def _in_place(listing: ListingRef, cache: Cache) -> ListedFiles:
    path = cache.fetch(listing.key, listing.sha256)
    return ListedFiles(Listing.load(path), open_location(listing.address))


def _fetch(raw: RawSource, cache: Cache) -> dict[str, Path]:
    """Returns local paths of the raw files, each verified, by their paths in the source."""
    missing = sum(file.size for file in raw.files if not cache.holds(file.sha256, file.size))
    with progress(f"Fetching {raw.name}", missing, unit="bytes") if missing else nullcontext() as advance:
        paths = in_parallel(
            lambda file: cache.fetch(file.key, file.sha256, size=file.size, on_progress=advance), raw.files
        )
    return {file.path: path for file, path in zip(raw.files, paths, strict=True)}


@contextmanager
def _cache_limited_afterwards(settings: Settings, store: ObjectStore) -> Iterator[None]:
    """Trims the cache at the end, if the user has set its limit: packing needs all raw files at the same time."""
    try:
        yield
    finally:
        if settings.cache_bytes:
            open_cache(store).trim()


@contextmanager
def _workspace(folder: Path) -> Iterator[Path]:
    """Yields an empty folder and removes it afterwards. Files of a killed run are removed: the step's lock is held."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _pack(
    raw: RawSource,
    files: Mapping[str, Path] | Files,
    labels: LabelTable | None,
    config: PreprocessConfig,
    out: Path,
    cache: Cache,
    journals: tuple[Journal, Journal],
    *,
    max_default_size: int,
    refresh: bool,
) -> Manifest:
    """Surveys and packs the images; the shards are in the bucket afterwards, and the image index in `out`.

    Args:
        journals: of the survey and the packing, and of packing once more if images that cannot be decoded had decided
            the size or the channels.
    """
    journal, second = journals
    left_out = LeftOut(raw.remarks, raw.left_out) if raw.remarks else None
    source = open_source(raw.format, files, raw.classes or None, left_out, given_by(labels) if labels else None)
    if surveyed := journal.survey_parts():
        run_logger().info("%s: going on with an interrupted run: %d images surveyed", raw.name, surveyed[-1].stop)
    with progress(f"Reading {raw.name}", len(source), unit="images") as advance:
        plan = survey(
            source,
            config,
            advance,
            done=surveyed,
            on_part=journal.note_part,
            max_default_size=max_default_size,
        )

    def packed(plan: Plan, journal: Journal) -> Packed:
        done = journal.shards()
        if count := sum(each.shard.count for each in done):
            run_logger().info("%s: going on with an interrupted run: %d images packed", raw.name, count)
        with (
            progress(f"Packing {raw.name}", plan.count, unit="images", artifact="preprocess") as advance,
            ShardStore(cache, journal, keep=fits_cache(plan, cache), refresh=refresh) as shards,
        ):
            return pack(source, plan, config, out, advance, done=done, on_shard=shards.add)

    result = packed(plan, journal)
    again = retarget(plan, source, result.splits, config, max_default_size=max_default_size)
    if again.target != plan.target:
        run_logger().info("%s: packing again: unreadable images had decided the size or channels", raw.name)
        plan, result = again, packed(again, second)
    write_index(out / INDEX, source, plan, result, labels)
    return result.manifest


def _clear(journals: Iterable[Journal]) -> None:
    for journal in journals:
        journal.clear()


def _commit(store: ObjectStore, key: str, data: bytes) -> None:
    """Writes a commit object; replaces one with other content, which is damaged or outdated."""
    if not store.put_if_absent(key, data) and store.get_bytes(key) != data:
        store.put_bytes(key, data)


def _log_summary(name: str, manifest: Manifest) -> None:
    counts = ", ".join(f"{split} {info.count}" for split, info in manifest.splits.items())
    classes = "1 class" if len(manifest.classes) == 1 else f"{len(manifest.classes)} classes"
    shape = f"{manifest.channels} x {manifest.image_size} x {manifest.image_size}"
    run_logger().info("%s: %s, %s pixels, %s images", name, classes, shape, counts)
    _warn(name, manifest)


def _warn(name: str, manifest: Manifest) -> None:
    for warning in manifest.report.warnings:
        run_logger().warning("%s: %s", name, warning)
