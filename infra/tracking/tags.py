"""Every tag of runs and registered versions in MLflow and label of flow runs; and what a version's tags say, typed.

Names of tags are promises to scripts and to earlier versions of Convoy: they are added to, never renamed.
"""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field

from infra.records import Record

# Of runs
MANIFEST_DIGEST = "convoy.manifest_digest"
"""Digest of what the weights are a function of; every run of Convoy's has it."""

FLOW_RUN = "prefect.flow_run_id"
FLOW_RUN_URL = "prefect.flow_run_url"
MODEL = "convoy.model"
CODE_DIGEST = "convoy.code_digest"
CHECKPOINT_PREFIX = "convoy.checkpoint_prefix"
SHUFFLE_WINDOW = "convoy.shuffle_window"
MIXING = "convoy.mixing"
WORLD_SIZE = "convoy.world_size"
DATA_GATE = "convoy.data_gate"
"""The outcome, set when all of the report is there."""

GIT_DIRTY = "convoy.git_dirty"
LOCK_SHA256 = "convoy.lock_sha256"
LIBRARY = "convoy.version."
"""Prefix of the tags that give a library's version."""

SOURCE_COMMIT = "mlflow.source.git.commit"
"""MLflow's own, which its pages show."""

# Of a run's data set
DIGEST = "convoy.digest"
CONTEXT = "mlflow.data.context"

# Of runs and of versions
DATASET_VERSION = "convoy.dataset_version"
WEIGHTS_SHA256 = "convoy.weights_sha256"
TEMPERATURE = "convoy.temperature"

# Of versions
SERVING = "convoy.serving"
VERDICT = "convoy.verdict"
VERDICT_CHAMPION = f"{VERDICT}_champion"
NO_CHAMPION = "none"

# Of flow runs: Prefect's labels
MLFLOW_RUN = "convoy.mlflow_run"
HELD_LEASE = "convoy.lease"
"""The concurrency limit whose slot the flow run holds."""


class VersionRecord(Record, alias_generator=lambda name: f"convoy.{name}", populate_by_name=True):
    """What a registered version was made of, and how its gates ended; None where its tags do not say.

    Earlier versions of Convoy, and people who register by hand, leave tags out.
    """

    dataset: str | None = None
    """Name of the data."""

    dataset_version: str | None = None
    weights_sha256: str | None = None
    weights_key: str | None = None
    """In the bucket."""

    reference_key: str | None = None
    """In the bucket: test images with their predictions."""

    test_accuracy: str | None = None
    temperature: str | None = None
    """What logits are divided by for calibrated probabilities."""

    git_commit: str | None = None
    flow_run: str | None = Field(None, alias=FLOW_RUN)
    serving: str | None = None
    """`pending`, `passed` or `failed`: the serving gate."""

    verdict: str | None = None
    """`passed` or `refused`: the quality gate."""

    verdict_summary: str | None = None
    verdict_champion: str | None = None
    """`name/version` that it was judged against, or `NO_CHAMPION`."""

    verdict_sha256: str | None = None

    @classmethod
    def from_tags(cls, tags: Mapping[str, str]) -> Self:
        """Returns what a version's tags say; others' tags are passed over."""
        return cls.model_validate(tags, by_alias=True, by_name=False)

    def to_tags(self) -> dict[str, str]:
        """Returns the tags that say this."""
        known: dict[str, Any] = self.model_dump(by_alias=True, exclude_none=True)
        return known
