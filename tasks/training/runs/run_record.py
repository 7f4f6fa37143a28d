"""The record of what a training was started with, for its resume: runs/<run>/run.json in the bucket.

This module loads neither torch nor Prefect.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from cnn.data.manifest import canonical_json
from infra.errors import UsageError
from infra.records import Record
from infra.storage import bucket_layout
from infra.storage.object_store import open_bucket
from infra.storage.s3_client import ObjectMissing
from infra.tracking import mlflow_runs
from tasks.config.run import RunConfig
from tasks.data.dataset import DatasetRef
from tasks.training.platform import Platform


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


def check_resumable(run_id: str) -> RunConfig:
    """Returns the configuration of an unfinished run.

    Call this again once the model's lease is held: the run may finish while its resume waits for the lease.

    Raises:
        UsageError: there is no such run, or it has finished.
    """
    record = read_record(run_id)
    if mlflow_runs.run_status(run_id) == "FINISHED":
        raise UsageError(f"run {run_id} has finished; there is nothing to resume")
    return record.config


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested values by dotted keys, as in `--set`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
