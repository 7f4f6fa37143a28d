"""Names all tags of runs and registered versions in MLflow and all labels of flow runs, and types a version's tags.

Scripts and earlier versions of Convoy rely on these names: new ones may be added, but none is ever renamed.
"""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field

from infra.records import Record

# Of runs
MANIFEST_DIGEST = "convoy.manifest_digest"
"""Digest of the manifest of a run; every run of Convoy has it."""

FLOW_RUN = "prefect.flow_run_id"
FLOW_RUN_URL = "prefect.flow_run_url"
MODEL = "convoy.model"
CODE_DIGEST = "convoy.code_digest"
CHECKPOINT_PREFIX = "convoy.checkpoint_prefix"
SHUFFLE_WINDOW = "convoy.shuffle_window"
MIXING = "convoy.mixing"
WORLD_SIZE = "convoy.world_size"
DATA_GATE = "convoy.data_gate"
"""The outcome, set after the whole report is stored."""

GIT_DIRTY = "convoy.git_dirty"
LOCK_SHA256 = "convoy.lock_sha256"
LIBRARY = "convoy.version."
"""Prefix of the tags that give a library's version."""

SOURCE_COMMIT = "mlflow.source.git.commit"
"""MLflow's own tag, which its pages show."""

# Of a run's data set
DIGEST = "convoy.digest"
CONTEXT = "mlflow.data.context"

# Of runs and of versions
DATASET_VERSION = "convoy.dataset_version"
WEIGHTS_SHA256 = "convoy.weights_sha256"
TEMPERATURE = "convoy.temperature"

# Of versions
SERVING = "convoy.serving"
NO_CHAMPION = "none"

# Of flow runs: Prefect's labels
MLFLOW_RUN = "convoy.mlflow_run"
HELD_LEASE = "convoy.lease"
"""The concurrency limit of which the flow run holds a slot."""


class VersionRecord(Record, alias_generator=lambda name: f"convoy.{name}", populate_by_name=True):
    """A registered version's lineage and the outcomes of its gates; None where it has no tag.

    Tags are missing on versions that an earlier Convoy, or a user by hand, has registered.
    """

    dataset: str | None = None
    """Name of the data set."""

    dataset_version: str | None = None
    weights_sha256: str | None = None
    weights_key: str | None = None
    reference_key: str | None = None
    """Key in the bucket of test images with their predictions."""

    test_accuracy: str | None = None
    temperature: str | None = None
    """The divisor of the logits that calibrates the probabilities."""

    git_commit: str | None = None
    flow_run: str | None = Field(None, alias=FLOW_RUN)
    serving: str | None = None
    """Outcome of the serving gate: `pending`, `passed` or `failed`."""

    verdict: str | None = None
    """Outcome of the quality gate: `passed` or `refused`."""

    verdict_summary: str | None = None
    verdict_champion: str | None = None
    """`name/version` that it was compared with, or `NO_CHAMPION`."""

    verdict_sha256: str | None = None

    @classmethod
    def from_tags(cls, tags: Mapping[str, str]) -> Self:
        """Reads a version's tags; ignores tags of other programs."""
        return cls.model_validate(tags, by_alias=True, by_name=False)

    def to_tags(self) -> dict[str, str]:
        """Returns the tags of this record."""
        known: dict[str, Any] = self.model_dump(by_alias=True, exclude_none=True)
        return known
