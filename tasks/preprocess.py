"""The preprocess task: from raw files in the bucket to a dataset version there, or finding an earlier one."""

import hashlib
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel, ConfigDict, ValidationError

from cnn.codedigest import code_digest
from cnn.config import PreprocessConfig
from cnn.errors import InputError
from cnn.manifest import Manifest, canonical_json
from cnn.preprocess import code_files, pack
from cnn.shards import shard_path
from cnn.sources import open_source
from cnn.sources.decode import decoder_versions
from cnn.survey import survey
from infra.cache import Cache
from infra.files import locked
from infra.meter import in_parallel
from infra.objectstore import ObjectMissing, ObjectStore
from infra.raw import RawSource
from infra.settings import Settings
from tasks.dataset import DatasetRef, is_stored, is_whole, manifest_key, shard_key, shards_of
from tasks.progress import progress, run_logger
from tasks.retries import RETRIED

__all__ = ["DatasetRef", "preprocess"]


class StepRecord(BaseModel):
    """What an earlier run of the step made of the same input."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset_version: str


@task(name="preprocess", cache_policy=NO_CACHE, persist_result=False, **RETRIED)
def preprocess(raw: RawSource, config: PreprocessConfig, *, refresh: bool = False) -> DatasetRef:
    """Pack a source into a dataset version, unless that was done before.

    Prefect's own cache is not used: it knows neither our code nor what the bucket still holds.

    Args:
        refresh: compute and store everything anew, even if it is there.

    Raises:
        InputError: the images cannot be used.
        ServiceError: the object store failed.
    """
    settings = Settings()
    store = ObjectStore.connect(settings.bucket)
    cache = Cache(settings.cache, store)
    key = step_key(raw, config)
    with locked(settings.cache / "locks" / f"preprocess-{key}"):  # whoever waits here finds the result
        if not refresh and (version := _find(store, key)):
            return DatasetRef(version=version, name=raw.name, reused=True)
        files = _fetch(raw, cache)
        with _workspace(settings.home / "work" / f"preprocess-{key}") as out:
            try:
                manifest = _pack(raw, files, config, out)
            except InputError as error:
                raise InputError(f"{raw.name}: {error}") from error
            _store_shards(raw.name, manifest, out, cache, refresh=refresh)
        version = manifest.version
        _commit(store, manifest_key(version), manifest.to_bytes())
        _commit(store, _record_key(key), StepRecord(dataset_version=version).model_dump_json().encode())
    _tell(raw.name, manifest)
    return DatasetRef(version=version, name=raw.name)


def step_key(raw: RawSource, config: PreprocessConfig) -> str:
    """Digest of all that decides the outcome: raw data, parameters, code, and the image decoders used."""
    content = {
        "raw": raw.digest,
        "classes": raw.classes,
        "config": config.model_dump(mode="json"),
        "code": code_digest(code_files()),
        "decoders": decoder_versions(),
    }
    return hashlib.sha256(canonical_json(content)).hexdigest()


def _record_key(step: str) -> str:
    return f"steps/preprocess/{step}.json"


def _find(store: ObjectStore, step: str) -> str | None:
    """The dataset version of an earlier run, if all of it is still there."""
    try:
        version = StepRecord.model_validate_json(store.get_bytes(_record_key(step))).dataset_version
    except (ObjectMissing, ValidationError):
        return None
    return version if is_whole(store, version) else None


def _fetch(raw: RawSource, cache: Cache) -> dict[str, Path]:
    """Local paths of the raw files by their paths in the source."""
    missing = sum(file.size for file in raw.files if not cache.holds(file.sha256, file.size))
    if not missing:
        return {file.path: cache.path(file.sha256) for file in raw.files}
    with progress(f"Fetching {raw.name}", missing, unit="bytes") as advance:
        paths = in_parallel(
            lambda file: cache.fetch(file.key, file.sha256, size=file.size, on_progress=advance),
            raw.files,
            threading.Event(),
        )
    return {file.path: path for file, path in zip(raw.files, paths, strict=True)}


@contextmanager
def _workspace(folder: Path) -> Iterator[Path]:
    """An empty folder, removed afterwards; a killed run's leavings too, since the step's lock is held."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _pack(raw: RawSource, files: dict[str, Path], config: PreprocessConfig, out: Path) -> Manifest:
    source = open_source(raw.format, files, raw.classes or None)
    with progress(f"Reading {raw.name}", len(source), unit="images") as advance:
        plan = survey(source, config, advance)
    with progress(f"Packing {raw.name}", plan.count, unit="images", artifact="preprocess") as advance:
        return pack(source, plan, config, out, advance)


def _store_shards(name: str, manifest: Manifest, out: Path, cache: Cache, *, refresh: bool) -> None:
    """Move the shards into the cache, and upload those that the bucket lacks."""
    shards = shards_of(manifest)
    for shard in shards:
        path = shard_path(out, shard.sha256)
        cache.add_file(path)
        path.unlink()
    missing = [shard for shard in shards if refresh or not is_stored(cache.store, shard)]
    with progress(f"Storing {name}", sum(shard.bytes for shard in missing), unit="bytes") as advance:
        for shard in missing:
            cache.store.put_file(shard_key(shard), cache.path(shard.sha256), sha256=shard.sha256, on_progress=advance)


def _commit(store: ObjectStore, key: str, data: bytes) -> None:
    """Write a commit object; one that is there with other content is damaged or outdated, and is replaced."""
    if not store.put_if_absent(key, data) and store.get_bytes(key) != data:
        store.put_bytes(key, data)


def _tell(name: str, manifest: Manifest) -> None:
    counts = ", ".join(f"{split} {info.count}" for split, info in manifest.splits.items())
    size = manifest.image_size
    run_logger().info(
        "%s: %d classes, %d x %d x %d pixels, %s images",
        name,
        len(manifest.classes),
        manifest.channels,
        size,
        size,
        counts,
    )
    for warning in manifest.report.warnings:
        run_logger().warning("%s: %s", name, warning)
