"""Names all tags of runs and registered versions in MLflow and all labels of flow runs, and types a version's tags.

Scripts and earlier versions of Convoy rely on these names: new ones may be added, but none is ever renamed.
"""

import re
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

SWEEP = "convoy.sweep"
"""Of a sweep's trial: the run of the sweep. `PARENT` lets MLflow's list show trials below their sweep."""

SWEEP_TRIAL = "convoy.sweep_trial"
"""The number of a trial in its sweep, from 1."""

SWEEP_VALUES = "convoy.sweep_values"
"""Of a trial: the keys that the sweep has set, as JSON."""

SWEEP_FAILED = "convoy.sweep_failed"
"""Of a trial: why its training failed, which would fail again."""

SWEEP_BEST = "convoy.sweep_best"
"""Of the best trial, once it is known: it is an ordinary training from then on."""

DESCRIPTION = "mlflow.note.content"  # at the top of a run's page
PARENT = "mlflow.parentRunId"

SOURCE_COMMIT = "mlflow.source.git.commit"
SOURCE_NAME = "mlflow.source.name"
USER = "mlflow.user"
"""MLflow's own tags, which its pages show."""

RESULT = "convoy.result"
"""Of a run and of a version: test accuracy and outcome in a few words, for people."""

MODEL_VERSION = "convoy.model_version"
"""`name/version` that the run has registered."""

# Of a run's data set
DIGEST = "convoy.digest"
CONTEXT = "mlflow.data.context"

# Of runs and of versions
DATASET_VERSION = "convoy.dataset_version"
WEIGHTS_SHA256 = "convoy.weights_sha256"
TEMPERATURE = "convoy.temperature"

VERDICT = "convoy.verdict"
"""Of a run, the outcome of the last gate that its version has reached; of a version, that of the quality gate."""

# Of versions
SERVING = "convoy.serving"
NO_CHAMPION = "none"
WAITING, APPROVED, REFUSED, EXPIRED = "waiting", "approved", "refused", "expired"
"""Values of `convoy.approval`."""

# Of flow runs: Prefect's labels
MLFLOW_RUN = "convoy.mlflow_run"
HELD_LEASE = "convoy.lease"
"""The concurrency limit of which the flow run holds a slot."""

STARTED_BY = "convoy.started_by"
"""Why the flow run runs, for those that `convoy retrain` asks for and for resumptions."""

COMMIT = "convoy.commit"
"""The commit whose code the flow run runs, if it was asked for one."""

TRIAL = "convoy.trial"
"""Of a flow run that tries a commit or judges it: what for, such as a pull request; of several commits with the same
value, the newest counts. Also a tag of the trial's run in MLflow."""

ALIVE = "convoy.alive"
"""A number that the flow run's process counts up."""

RESUMABLE = "convoy.resumable"
"""Why a failed flow run may go on: what ended it was no fault of data, configuration or code."""

EXIT_STATUS = "convoy.exit_status"
"""Of a flow run that failed by a mistake: the status with which `convoy retrain --wait` ends."""

RESUMED_BY = "convoy.resumed_by"
"""The flow run that goes on with a dead one; or why none does."""

RESUMES = "convoy.resumes"
"""The dead flow run that this one goes on with."""

RESUMED_STEP = "convoy.resumed_step"
"""The step of the newest checkpoint when the flow run was resumed."""

RESUMED_TRIES = "convoy.resumed_tries"
"""Number of resumptions from that step."""


class VersionRecord(Record, alias_generator=lambda name: f"convoy.{name}", populate_by_name=True):
    """A registered version's lineage and the outcomes of its gates; None where it has no tag.

    Tags are missing on versions that an earlier Convoy, or a user by hand, has registered.
    """

    # The first fields come first on MLflow's pages.
    result: str | None = None
    """The headline, for people."""

    test_accuracy: str | None = None
    serving: str | None = None
    """Outcome of the serving gate: `pending`, `passed` or `failed`."""

    dataset: str | None = None
    """Name of the data set."""

    dataset_version: str | None = None
    weights_sha256: str | None = None
    weights_key: str | None = None
    reference_key: str | None = None
    """Key in the bucket of test images with their predictions."""

    temperature: str | None = None
    """The divisor of the logits that calibrates the probabilities."""

    git_commit: str | None = None
    flow_run: str | None = Field(None, alias=FLOW_RUN)
    verdict: str | None = None
    """Outcome of the quality gate: `passed` or `refused`."""

    verdict_summary: str | None = None
    verdict_champion: str | None = None
    """`name/version` that it was compared with, or `NO_CHAMPION`."""

    verdict_sha256: str | None = None

    approval: str | None = None
    """A person's decision: `waiting`, `approved`, `refused`, or `expired` if none came; None if nobody was asked."""

    approval_by: str | None = None
    """Name that the person gave."""

    approval_reason: str | None = None

    @property
    def accuracy(self) -> float | None:
        """The test accuracy; None without a valid one, since people can change tags."""
        known = re.fullmatch(r"[01]\.\d+", self.test_accuracy or "")
        return float(known[0]) if known else None

    @property
    def outcome(self) -> str:
        """What the last gate or person said: `passed`, `refused`, `waits for approval`, …; empty if there was none."""
        if self.verdict == "passed" and self.approval in (WAITING, REFUSED, EXPIRED):
            return "waits for approval" if self.approval == WAITING else "not approved"
        return self.verdict or ("serving failed" if self.serving == "failed" else "")

    @property
    def headline(self) -> str:
        """The test accuracy and the outcome, in a few words."""
        known = "test accuracy unknown" if self.accuracy is None else f"{self.accuracy:.2%} test accuracy"
        return f"{known}, {self.outcome or 'not judged'}"

    @property
    def awaits_approval(self) -> bool:
        """Whether a person has to decide about it; a later refusal of the quality gate makes that unnecessary."""
        return self.approval == WAITING and self.verdict == "passed"

    @property
    def approval_sentence(self) -> str:
        """Returns a person's decision as a clause, such as `refused by Ann: too dark`; empty if nobody was asked."""
        if self.approval in (APPROVED, REFUSED):
            return f"{self.approval} by {self.approval_by}" + (f": {why}" if (why := self.approval_reason) else "")
        if self.approval == EXPIRED:
            return "nobody decided in time"
        return "waiting for a person's decision" if self.awaits_approval else ""

    @classmethod
    def from_tags(cls, tags: Mapping[str, str]) -> Self:
        """Reads a version's tags; ignores tags of other programs."""
        return cls.model_validate(tags, by_alias=True, by_name=False)

    def to_tags(self) -> dict[str, str]:
        """Returns the tags of this record."""
        known: dict[str, Any] = self.model_dump(by_alias=True, exclude_none=True)
        return known


def decision(outcome: str, by: str = "", reason: str = "") -> VersionRecord:
    """Returns the record of a person's decision, which replaces every field of an earlier one.

    Args:
        outcome: `WAITING`, `APPROVED`, `REFUSED` or `EXPIRED`.
    """
    return VersionRecord(approval=outcome, approval_by=by, approval_reason=reason)
