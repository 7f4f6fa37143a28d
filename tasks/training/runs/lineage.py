"""Reads what runs and versions were made of, from `runs/<run>/run.json` and a version's tags."""

import json

from infra.errors import ServiceError
from infra.storage import bucket_layout
from infra.storage.object_store import ObjectStore
from infra.storage.s3_client import ObjectMissing
from infra.tracking.model_registry import RegisteredVersion
from infra.tracking.promotion_history import Lineage


class RecordDamaged(ServiceError):
    """A run's record cannot be read, so the data that the run needs are unknown."""


def run_lineage(store: ObjectStore, run_id: str) -> Lineage:
    """Returns what a run was made of; only its id if it has no record.

    Reads only the fields that it needs, since earlier code may have written the record.

    Raises:
        RecordDamaged: the record cannot be read.
        ServiceError: the storage failed.
    """
    key = bucket_layout.run_record(run_id)
    try:
        record = json.loads(store.get_bytes(key))
        return Lineage(
            run_id=run_id,
            dataset_version=record["dataset"]["version"],
            dataset_name=record["dataset"]["name"],
            pretrained_sha256=record["manifest"]["config"].get("pretrained_sha256"),
        )
    except ObjectMissing:
        return Lineage(run_id=run_id)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordDamaged(
            f"{store.uri(key)} is damaged ({error}), so the data that the run needs are unknown"
        ) from error


def version_lineage(store: ObjectStore, version: RegisteredVersion) -> Lineage:
    """Returns what a registered version was made of, from its tags and its run's record.

    Raises:
        RecordDamaged: the record cannot be read.
        ServiceError: the storage failed.
    """
    record = version.record
    named = {
        "weights_key": record.weights_key,
        "weights_sha256": record.weights_sha256,
        "dataset_version": record.dataset_version,
        "dataset_name": record.dataset,
    }
    recorded = run_lineage(store, version.run_id)
    return recorded.model_copy(update={key: value for key, value in named.items() if value})
