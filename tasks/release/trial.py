"""Judges the model of a trial as if it were a new version of its name; registers and promotes nothing."""

from collections.abc import Sequence
from datetime import UTC, datetime

from prefect.artifacts import create_markdown_artifact

from infra.errors import UsageError
from infra.storage.object_store import open_bucket
from infra.tracking import mlflow_runs
from infra.tracking.model_registry import RegisteredVersion, search_versions
from infra.tracking.tags import RESULT, TRIAL, VERDICT, VersionRecord
from tasks.config.gates import GateConfig
from tasks.data.dataset import load_manifest
from tasks.evaluation.split_predictions import load_predictions
from tasks.orchestration.step import step
from tasks.release.quality.verdict import Verdict
from tasks.release.quality_gate import judge_version, log_verdict

COMMIT_DIGITS = 8  # in the name under which the verdict speaks of a trial


@step("quality-gate")
def judge(name: str, run_id: str, config: GateConfig, slices: Sequence[str]) -> Verdict:
    """Compares a trial with the champion of a model; publishes the verdict in the trial's MLflow run and in Prefect.

    The trial's own code has predicted the test images, since the code here may not know its network; what follows from
    the predictions is computed here. Latency is not measured, for the same reason.

    Raises:
        UsageError: the run is no trial that was evaluated.
        ServiceError: a server failed.
    """
    trial = _as_version(name, run_id)
    verdict = judge_version(trial, config.model_copy(update={"max_latency_ms": None}), slices)
    if config.max_latency_ms is not None:
        verdict = verdict.model_copy(update={"notes": (*verdict.notes, "the latency of a trial is not measured")})
    log_verdict(run_id, verdict)
    record = trial.record.model_copy(update={"verdict": verdict.outcome})
    mlflow_runs.set_tags(run_id, {VERDICT: verdict.outcome, RESULT: f"trial: {record.headline}"})
    create_markdown_artifact(verdict.markdown(), key="quality-gate", description=verdict.summary)
    return verdict


def _as_version(name: str, run_id: str) -> RegisteredVersion:
    """Returns a trial as a version that the registry does not have, for the quality gate."""
    tags = mlflow_runs.run_tags(run_id)
    record = VersionRecord.from_tags(tags)
    named = f"trial-{(record.git_commit or run_id)[:COMMIT_DIGITS]}"
    if TRIAL not in tags or search_versions(run_id=run_id):
        raise UsageError(f"run {run_id} is no trial of a commit")
    trial = RegisteredVersion(
        name=name, version=named, run_id=run_id, created=datetime.now(UTC), description="", tags=tags
    )
    dataset, weights = record.dataset_version, record.weights_sha256
    store = open_bucket()
    if not dataset or not weights or not load_predictions(store, run_id, load_manifest(store, dataset), weights):
        raise UsageError(f"trial {run_id} has not been evaluated")
    return trial
