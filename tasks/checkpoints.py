"""Weights of a training in the bucket: whole and committed, or not there.

runs/<run>/checkpoints/step-00005064/model.safetensors
runs/<run>/checkpoints/step-00005064/commit.json          written last, by a conditional put
"""

import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from infra.objectstore import ObjectStore
from tasks.job import Job


class Commit(BaseModel):
    """Says that a checkpoint is whole, and how to verify it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    manifest_digest: str
    files: dict[str, str]
    """SHA-256 of each file, by its key."""

    weights_sha256: str
    committed: float
    """Seconds since 1970."""


def checkpoint_prefix(run_id: str) -> str:
    """Where a training's checkpoints are in the bucket."""
    return f"runs/{run_id}/checkpoints/"


def commit_weights(store: ObjectStore, job: Job, *, step: int, weights: Path, weights_sha256: str) -> str:
    """Upload a weights file, then commit it; returns its key."""
    prefix = f"{checkpoint_prefix(job.run_id)}step-{step:08d}/"
    key = prefix + weights.name
    file_sha256 = store.put_file(key, weights)
    commit = Commit(
        step=step,
        manifest_digest=job.manifest_digest,
        files={key: file_sha256},
        weights_sha256=weights_sha256,
        committed=time.time(),
    )
    store.put_if_absent(prefix + "commit.json", commit.model_dump_json().encode())
    return key
