"""The record of what a training was started with, for its resume: runs/<run>/run.json in the bucket.

This module loads neither torch nor Prefect.
"""

import hashlib
from contextlib import suppress
from typing import Any

from pydantic import ValidationError
from pydantic.main import IncEx

from cnn.config.training import TrainConfig
from cnn.data.manifest import canonical_json
from cnn.networks.own import network_files
from infra.errors import UsageError
from infra.records import Record
from infra.storage import bucket_layout
from infra.storage.object_store import ObjectStore, open_bucket
from infra.storage.s3_client import ObjectMissing
from infra.tracking import mlflow_runs
from infra.tracking.model_registry import search_versions
from infra.tracking.promotion_history import find_model
from infra.tracking.tags import FLOW_RUN, SWEEP, SWEEP_BEST, TRIAL
from tasks.config.run import RunConfig
from tasks.data.dataset import DatasetRef, load_manifest
from tasks.training.platform import Platform, code_inputs, differences

MIN_PREFIX = 6  # digits of a dataset version


class RunManifest(Platform):
    """All inputs that decide the weights. Its digest identifies the training: equal digests promise equal weights."""

    dataset_version: str
    config: dict[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON."""
        return hashlib.sha256(canonical_json(self.model_dump())).hexdigest()


class RunRecord(Record, extra="forbid"):
    """Configuration, dataset and manifest of a run."""

    config: RunConfig
    dataset: DatasetRef
    manifest: RunManifest


def inputs_of(config: RunConfig, dataset: DatasetRef) -> dict[str, Any]:
    """Returns the fields of a training's manifest that do not depend on the machine."""
    return {
        **code_inputs(network_files(config.model)),
        "dataset_version": dataset.version,
        "config": config_inputs(config),
    }


def config_inputs(config: RunConfig) -> dict[str, Any]:
    """Returns the keys that decide the weights; those to start from are named by their digest, which is among them."""
    return config.training().model_dump(mode="json", exclude={"pretrained"})


def read_record(run_id: str) -> RunRecord:
    """Returns the record of a run.

    Raises:
        UsageError: there is no such run, or another version of Convoy wrote its record.
    """
    store = open_bucket()
    try:
        if "/" in run_id:  # it would name another object
            raise ObjectMissing(run_id)
        return RunRecord.model_validate_json(store.get_bytes(bucket_layout.run_record(run_id)))
    except ObjectMissing:
        raise UsageError(f"no run {run_id} in bucket {store.bucket}; `convoy runs` lists them") from None
    except ValidationError as error:
        raise UsageError(f"run {run_id} was made by another version of Convoy: {error.errors()[0]['msg']}") from None


def run_of_flow(flow_run: str) -> str | None:
    """Returns the newest run that a flow run has worked on; None if there is none, or it ended before its training."""
    runs = mlflow_runs.search_runs(FLOW_RUN, flow_run, limit=1) if flow_run else []
    return runs[0].run_id if runs and open_bucket().head(bucket_layout.run_record(runs[0].run_id)) else None


def check_resumable(run_id: str, *, trial: bool = False) -> RunConfig:
    """Returns the configuration of an unfinished run, or of a finished one whose version waits for approval.

    Call this again once the model's lease is held: the run may finish while its resume waits for the lease.

    Args:
        trial: whether the run is to go on as a trial of a commit.

    Raises:
        UsageError: there is no such run, it has finished, it is a trial and `trial` is false, or the reverse, or it is
            one of a sweep that is not decided yet.
    """
    record, tags = read_record(run_id), mlflow_runs.run_tags(run_id)
    if SWEEP in tags and SWEEP_BEST not in tags:
        raise UsageError(f"run {run_id} is a trial of a sweep; `convoy sweep --resume {tags[SWEEP]}` goes on with that")
    if (TRIAL in tags) != trial:
        kind = "a trial of a commit, which registers nothing; `convoy trial` tries it again"
        raise UsageError(f"run {run_id} is {'no trial' if trial else kind}")
    if mlflow_runs.run_status(run_id) == "FINISHED" and not _waits_for_approval(run_id):
        raise UsageError(f"run {run_id} has finished; there is nothing to resume")
    return record.config


def check_same_result(run_id: str, earlier: RunConfig, current: RunConfig) -> None:
    """Refuses a resume with other values of keys that decide data or weights, before anything is loaded or started.

    Raises:
        UsageError: a key differs.
    """
    decisive = {*TrainConfig.model_fields, "dataset", "data"}
    place: IncEx = {"data": {"keep_raw", "slices"}}  # which make no difference
    before, now = (config.model_dump(mode="json", include=decisive, exclude=place) for config in (earlier, current))
    if differing := differences(before, now):
        raise UsageError(
            f"run {run_id} cannot go on here, because its weights would differ: {'; '.join(differing)}; "
            f"leave {'it' if len(differing) == 1 else 'them'} out, or train again"
        )


def _waits_for_approval(run_id: str) -> bool:
    return any(version.record.awaits_approval for version in search_versions(run_id=run_id))


def find_dataset(store: ObjectStore, reference: str) -> str:
    """Returns the dataset version that a reference names.

    Args:
        reference: the beginning of a dataset version, an MLflow run id, or a model (`NAME`, `NAME@ALIAS`,
            `NAME/VERSION`), which means the data of its test.

    Raises:
        UsageError: it names none, or several.
    """
    if len(reference) >= MIN_PREFIX and not set(reference) - set("0123456789abcdef"):
        prefix = bucket_layout.DATASETS + reference
        found = sorted({bucket_layout.part(info.key, 1) for info in store.list(prefix)})
        if len(found) > 1:
            raise UsageError(f"several dataset versions begin with {reference}: {', '.join(found[:5])}")
        if found:
            load_manifest(store, found[0])
            return found[0]
        try:
            return read_record(reference).dataset.version
        except UsageError:
            with suppress(UsageError):  # a model may be called `facade`
                return find_model(store, reference).required("dataset_version")
            raise
    return find_model(store, reference).required("dataset_version")
