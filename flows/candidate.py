"""From a dataset to a version that is registered, judged and released: `pipeline` goes on here if there is work.

A module of its own, since it loads PyTorch, which takes seconds.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

from prefect.futures import PrefectFuture
from prefect.runtime import flow_run

from flows.step_timer import StepTimer
from flows.summary import Summary
from infra.errors import GateRefused
from infra.storage.object_store import open_bucket
from infra.tracking.client import tracking_uri
from infra.tracking.mlflow_runs import run_url, runs_url, set_tags
from infra.tracking.model_registry import ModelVersion
from infra.tracking.model_versions import find_version
from infra.tracking.promotion_history import Promotion
from infra.tracking.tags import APPROVED, WAITING, VersionRecord, decision
from tasks.config.run import RunConfig
from tasks.data.data_gate import DataRefused, DataReport, data_gate, log_data_report
from tasks.data.dataset import DatasetRef
from tasks.evaluation.evaluate import Evaluation, evaluate, publish
from tasks.orchestration.retries import outlast
from tasks.release.approval import ApprovalRefused, record_decision, wait_for_approval
from tasks.release.model_card import write_model_card
from tasks.release.promote import champion_data, promotions_of, verdict_on
from tasks.release.quality.verdict import Verdict
from tasks.release.quality_gate import QualityRefused, quality_gate
from tasks.release.register import register, version_record
from tasks.release.release import release
from tasks.release.report_page import publish_page
from tasks.release.serving.clients import FreshProcesses
from tasks.release.serving_gate import serving_gate
from tasks.training.liveness import hold_run_lock
from tasks.training.runs.tracked_run import TrackedRun, flow_tags, log_cost, tracked_run
from tasks.training.train import TrainResult, train


def train_version(
    summary: Summary,
    config: RunConfig,
    dataset: DatasetRef,
    resume: str | None,
    step_timer: StepTimer,
    *,
    warm: bool,
) -> Summary:
    """Trains, evaluates, registers and judges a version; releases it unless a person has to approve it first.

    Args:
        warm: whether the training starts from the champion's weights.
    """
    name = summary.model_name or dataset.name
    try:
        checked = checked_data(name, config, dataset, warm=warm)
    except DataRefused as refused:
        return _refused(summary, refused)
    step_timer("data-gate", checked)
    with tracked_run(config, dataset, resume) as run, FreshProcesses() as fresh:
        outlast(partial(log_data_report, run.run_id, checked))
        trained = step_timer("train", train(run, dataset, config, fresh.load_early))
        fresh.load_early()  # an earlier process may have trained the last epoch
        evaluated = step_timer("evaluate", evaluate(config.training(), dataset, trained, slices=config.data.slices))
        with ExitStack() as background:
            published = publish.submit(config.training(), dataset, evaluated)
            background.callback(published.wait)  # nothing writes to the run once it is closed
            registered = register(name, config.training(), dataset, trained, evaluated)
            step_timer("register", registered)
            write_model_card(registered, config, dataset, trained, evaluated)
            summary = _with_training(summary, run, trained, evaluated)
            summary = summary.model_copy(update={"model_version": registered.version})
            summary = _through_gates(summary, config, registered, evaluated, fresh, published)
            step_timer("gates", summary)
        published.result()  # raises its error here if a gate refused before the result was read
        publish_page(outlast(partial(find_version, registered.address)))
        log_cost(run.run_id, step_timer.seconds, trained.rank_seconds / 3600)
    return summary


def checked_data(name: str, config: RunConfig, dataset: DatasetRef, *, warm: bool) -> DataReport:
    """Runs the data gate, against the champions of a model.

    Raises:
        DataRefused: the data may not be trained on.
    """
    champions = outlast(partial(champion_data, name))  # MLflow may be away after hours of packing
    return data_gate(
        dataset,
        config.data_gate,
        champions.present,
        oldest=champions.oldest,
        images_for_margin=config.gate.images_for_margin(),
        warm_start=warm,
    )


def try_out(
    summary: Summary, config: RunConfig, dataset: DatasetRef, resume: str | None, step_timer: StepTimer
) -> Summary:
    """Trains and evaluates in an experiment of its own; registers nothing, and leaves the verdict to others.

    The MLflow run gets the tags that a version would have.
    """
    with tracked_run(config, dataset, resume, trial=True) as run:
        trained = step_timer("train", train(run, dataset, config))
        evaluated = step_timer("evaluate", evaluate(config.training(), dataset, trained, slices=config.data.slices))
        publish(config.training(), dataset, evaluated)
        outlast(partial(set_tags, run.run_id, version_record(dataset, trained, evaluated).to_tags()))
        log_cost(run.run_id, step_timer.seconds, trained.rank_seconds / 3600)
    return _with_training(summary, run, trained, evaluated)


def judge_again(summary: Summary, config: RunConfig, version: ModelVersion) -> Summary:
    """Judges and releases the version of an earlier training that a new training would repeat."""
    known = {"model_version": version.version, **_links(find_version(version.address).run_id)}
    summary = _through_gates(summary.model_copy(update=known), config, version, None)
    publish_page(outlast(partial(find_version, version.address)))
    return summary


def _through_gates(
    summary: Summary,
    config: RunConfig,
    registered: ModelVersion,
    evaluated: Evaluation | None,
    fresh: FreshProcesses | None = None,
    published: PrefectFuture[None] | None = None,
) -> Summary:
    """Runs serving gate, quality gate and release; returns the summary with the outcome.

    If a person has to approve the release, the version is only marked as waiting for it. A version that an earlier try
    has promoted is not judged again: it would be compared with itself.

    Args:
        evaluated: None if the version passed the serving gate before.
        fresh: starts the processes of the serving gate, which `evaluated` needs.
        published: the task run that publishes the evaluation.
    """
    if evaluated and (entries := promotions_of(registered)):
        return _promoted_before(summary, registered, entries)
    summary = summary.model_copy(update={"champion": False})
    try:
        if evaluated and fresh:
            serving_gate(registered, evaluated, config.serving, fresh, config.model)
        if published:
            published.result()  # before anything is released
        verdict = quality_gate(registered, config.gate, slices=config.data.slices)
        summary = _with_verdict(summary, verdict)
        if config.promotes and config.approval:
            record_decision(registered, decision(WAITING))
        elif config.promotes:
            summary = _release(summary, config, registered)
    except GateRefused as refused:
        return _refused(summary, refused)
    return summary


def with_approval(summary: Summary, config: RunConfig, step_timer: StepTimer) -> Summary:
    """Waits for a person's decision about a version that waits for it, and releases the version or not."""
    version = outlast(partial(find_version, f"{summary.model_name}/{summary.model_version}"))
    verdict = verdict_on(open_bucket(), version)
    if not version.record.awaits_approval or verdict is None:
        return summary
    with hold_run_lock(version.run_id, str(flow_run.id)):
        outlast(partial(set_tags, version.run_id, flow_tags()))  # another flow run may have made the version
        with step_timer.stopped():
            made = wait_for_approval(version, verdict, config.approval_patience)
        if made.approval == APPROVED:
            try:
                summary = _release(summary, config, version, made)
            except GateRefused as refused:  # by a champion that is newer than the verdict
                summary = _refused(summary, refused)
        elif (entries := promotions_of(version)) and entries[-1].to_version == version.version:
            # `convoy promote` has made it the champion while it waited, and no rollback since.
            summary, made = _promoted_before(summary, version, entries), _decided_by(entries[0])
        else:
            summary = _refused(
                summary, ApprovalRefused(f"{version.address} was not approved: {made.approval_sentence}")
            )
        record_decision(version, made)
        publish_page(outlast(partial(find_version, version.address)))
        return step_timer("release", summary.model_copy(update={"approval": made.approval_sentence}))


def _release(
    summary: Summary, config: RunConfig, version: ModelVersion, approval: VersionRecord | None = None
) -> Summary:
    """Makes a version the champion; first judges it again if the champion has changed since the verdict.

    Raises:
        GateRefused: it has not passed.
    """
    while not release(version, approval):
        summary = _with_verdict(summary, quality_gate(version, config.gate, slices=config.data.slices))
    return summary.model_copy(update={"champion": True})


def _promoted_before(summary: Summary, version: ModelVersion, entries: Sequence[Promotion]) -> Summary:
    """Returns the summary of a version that was promoted before, given the model's history since then."""
    first = entries[0]
    if find_version(version.address).record.awaits_approval:  # the process was killed just after the promotion
        record_decision(version, _decided_by(first))
    is_champion = entries[-1].to_version == version.version
    return summary.model_copy(update={"champion": is_champion, "verdict": first.verdict_summary})


def _decided_by(promotion: Promotion) -> VersionRecord:
    """Returns the decision that a promotion shows."""
    return decision(APPROVED, promotion.approved_by or promotion.who, promotion.reason)


def _refused(summary: Summary, refused: GateRefused) -> Summary:
    if isinstance(refused, QualityRefused):
        summary = _with_verdict(summary, refused.verdict)
    return summary.model_copy(update={"status": "refused", "error": str(refused), "exit_status": refused.exit_status})


def _with_verdict(summary: Summary, verdict: Verdict) -> Summary:
    return summary.model_copy(
        update={
            "verdict": verdict.summary,
            "accuracy": verdict.accuracy if summary.accuracy is None else summary.accuracy,
            "gain": verdict.gain,
        }
    )


def _with_training(summary: Summary, run: TrackedRun, trained: TrainResult, evaluated: Evaluation) -> Summary:
    return summary.model_copy(
        update={
            "accuracy": evaluated.accuracy,
            "weights_sha256": trained.weights_sha256,
            "world_size": trained.world_size,
            "train_seconds": round(trained.train_seconds, 3),
            "rank_hours": round(trained.rank_seconds / 3600, 6) or None,
            "images_per_second": round(trained.images_per_second, 1),
            "utilisation": trained.utilisation,
            "mlflow_tracking_uri": tracking_uri(),
            "checkpoint_prefix": run.checkpoint_prefix,
            **_links(run.run_id),
        }
    )


def _links(run_id: str) -> dict[str, str]:
    """Returns the fields of a summary that lead to an MLflow run."""
    return {"mlflow_run_id": run_id, "mlflow_run_url": run_url(run_id), "mlflow_runs_url": runs_url(run_id)}
