"""The way of a training from its source to the champion: the table of contents of the flows `train` and `retrain`."""

import time
from contextlib import ExitStack
from functools import partial
from typing import TypeVar

from prefect import states
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.utilities.urls import url_for

from flows.summary import Summary
from infra.errors import GateRefused
from infra.machine import stopping
from infra.machine.output import outlive_readers
from infra.tracking.client import check_server, tracking_uri
from infra.tracking.model_registry import ModelVersion
from infra.tracking.model_versions import find_version
from tasks.config.launchers import check_installed
from tasks.config.run import RunConfig
from tasks.data.data_gate import DataRefused, data_gate, log_data_report
from tasks.data.download import download
from tasks.data.preprocess import preprocess
from tasks.evaluation.evaluate import Evaluation, evaluate, publish
from tasks.orchestration.cancellation import Cancelled
from tasks.orchestration.flow_runs import flow_is_alive
from tasks.orchestration.model_lease import model_lease
from tasks.orchestration.retries import outlast
from tasks.release.approval import wait_for_approval
from tasks.release.model_card import write_model_card
from tasks.release.promote import champion_data, promotions_of
from tasks.release.quality_gate import QualityRefused, quality_gate
from tasks.release.register import register
from tasks.release.release import release
from tasks.release.report_page import publish_page
from tasks.release.retrain_decision import what_changed
from tasks.release.serving.clients import Consumer, Server
from tasks.release.serving_gate import serving_gate
from tasks.training.pretrained import pretrained
from tasks.training.runs.run_record import check_resumable, read_record
from tasks.training.runs.tracked_run import TrackedRun, log_cost, recorded_dataset, tracked_run, with_batch_size
from tasks.training.train import TrainResult, train

Output = TypeVar("Output")


@outlive_readers("stdout", "stderr")  # the worker that reads the output may be killed
@flow_is_alive()
def train_and_release(
    config: RunConfig,
    refresh: frozenset[str],
    resume: str | None = None,
    *,
    only_if_changed: bool = False,
    force: bool = False,
) -> Summary | State[Summary]:
    """Goes from the source to a version that is champion if it passes its gates; returns the result of a flow.

    Args:
        config: the configuration of the run.
        refresh: steps (`download`, `preprocess`) to repeat although their output exists.
        resume: id of the MLflow run of an unfinished training to continue.
        only_if_changed: end after preprocessing if the champion was made of the same data, code and configuration.
        force: train in any case.
    """
    stopping.overhear()  # in a worker's process; see tasks.orchestration.cancellation.stop_if_told
    step_timer = _StepTimer()
    check_installed(config.launcher)  # before hours of work
    check_server()
    reused: tuple[str, ...]
    if resume:
        dataset, reused = recorded_dataset(read_record(resume)), ("download", "preprocess")
    else:
        raw = download(config.dataset, refresh="download" in refresh, keep_raw=config.data.keep_raw)
        step_timer("download", raw)
        dataset = step_timer("preprocess", preprocess(raw, config.data, refresh="preprocess" in refresh))
        reused = tuple(step for step, output in (("download", raw), ("preprocess", dataset)) if output.reused)
        config = with_batch_size(config, dataset)
        if config.pretrained:
            config = pretrained(config, dataset)
    name = config.name or dataset.name
    summary = Summary(
        status="done",
        dataset=config.dataset,
        dataset_version=dataset.version,
        model_name=name,
        reused=reused,
        prefect_flow_run_id=flow_run.id,
        prefect_flow_run_url=url_for("flow-run", obj_id=flow_run.id),
    )
    try:
        with model_lease(name):
            if resume:
                check_resumable(resume)  # again: another process may have finished it while this one waited
            warm = False
            if only_if_changed:
                decision = step_timer("decide", what_changed(name, config, dataset, force=force))
                summary = summary.model_copy(update={"reason": decision.why})
                if decision.judge:
                    return _finish(_judge_again(summary, config, decision.judge), step_timer)
                if not decision.train:
                    return _finish(summary.model_copy(update={"status": "unchanged"}), step_timer)
                if config.warm_start and decision.champion_weights and not config.pretrained:
                    config = pretrained(config.model_copy(update={"pretrained": decision.champion_weights}), dataset)
                    warm = True
            champions = champion_data(name)
            checked = data_gate(
                dataset,
                config.data_gate,
                champions.present,
                oldest=champions.oldest,
                images_for_margin=config.gate.images_for_margin(),
                warm_start=warm,
            )
            step_timer("data-gate", checked)
            with tracked_run(config, dataset, resume) as run:
                outlast(partial(log_data_report, run.run_id, checked))
                trained = step_timer("train", train(run, dataset, config))
                evaluated = step_timer("evaluate", evaluate(config.training(), dataset, trained))
                with ExitStack() as background:
                    published = publish.submit(dataset, evaluated)
                    background.callback(published.wait)  # nothing writes to the run once it is closed
                    # The processes of the serving gate load their libraries while the version is registered.
                    consumer = background.enter_context(Consumer())
                    server = background.enter_context(Server()) if config.serving.http else None
                    registered = register(name, config.training(), dataset, trained, evaluated)
                    step_timer("register", registered)
                    write_model_card(registered, config, dataset, trained, evaluated)
                    summary = _with_version(summary, run, trained, evaluated, registered)
                    summary = _through_gates(summary, config, registered, evaluated, consumer, server, published)
                    step_timer("gates", summary)
                published.result()  # raises its error here if a gate refused before the result was read
                publish_page(outlast(partial(find_version, registered.address)))
                log_cost(run.run_id, step_timer.seconds, trained.world_size * trained.train_seconds / 3600)
    except DataRefused as refused:
        summary = _refused(summary, refused)
    except Cancelled as cancelled:
        # Prefect lets a cancelled run end in this state only, and raises `cancelled` from it in the caller.
        return states.Cancelled(message=str(cancelled), data=cancelled)  # type: ignore[arg-type]
    return _finish(summary, step_timer)


def _finish(summary: Summary, step_timer: "_StepTimer") -> Summary | State[Summary]:
    """Reports the end to Prefect: stores the summary as an artifact, and returns a state with a fitting name."""
    summary = summary.model_copy(update={"total_seconds": step_timer.total, "step_seconds": step_timer.seconds})
    rows = [{"name": name, "value": value} for name, value in summary.as_dict().items()]
    create_table_artifact(rows, key="summary", description=summary.headline)
    if summary.status == "done" and flow_run.run_count > 1:
        return summary  # after a retry in this process, Prefect raises the first try's error from a returned state
    names = {"refused": "Refused", "unchanged": "Skipped"}
    return states.Completed(name=names.get(summary.status, "Completed"), message=summary.headline, data=summary)


def _judge_again(summary: Summary, config: RunConfig, version: ModelVersion) -> Summary:
    """Judges and releases the version of an earlier training that a new training would repeat."""
    summary = _through_gates(summary.model_copy(update={"model_version": version.version}), config, version, None)
    publish_page(find_version(version.address))
    return summary


def _through_gates(
    summary: Summary,
    config: RunConfig,
    registered: ModelVersion,
    evaluated: Evaluation | None,
    consumer: Consumer | None = None,
    server: Server | None = None,
    published: PrefectFuture[None] | None = None,
) -> Summary:
    """Runs serving gate, quality gate, approval and release; returns the summary with the outcome.

    A version that an earlier try has promoted is not judged again: it would be compared with itself.

    Args:
        evaluated: None if the version passed the serving gate before.
        consumer: the fresh process of the serving gate, if it was started in advance.
        server: the HTTP server of the serving gate, if it was started in advance.
        published: the task run that publishes the evaluation.
    """
    if evaluated and (entries := promotions_of(registered)):
        is_champion = entries[-1].to_version == registered.version
        return summary.model_copy(update={"champion": is_champion, "verdict": entries[0].verdict_summary})
    summary = summary.model_copy(update={"champion": False})
    try:
        if evaluated:
            serving_gate(registered, evaluated, config.serving, consumer, server)
        if published:
            published.result()  # before anything is released
        verdict = quality_gate(registered, config.gate)
        summary = summary.model_copy(update={"verdict": verdict.summary})
        if config.promotes:
            reason = wait_for_approval(registered, verdict, config.approval_patience) if config.approval else ""
            release(registered, reason)
            summary = summary.model_copy(update={"champion": True})
    except QualityRefused as refused:
        return _refused(summary, refused).model_copy(update={"verdict": refused.verdict.summary})
    except GateRefused as refused:
        return _refused(summary, refused)
    return summary


def _refused(summary: Summary, refused: GateRefused) -> Summary:
    return summary.model_copy(update={"status": "refused", "error": str(refused), "exit_status": refused.exit_status})


def _with_version(
    summary: Summary, run: TrackedRun, trained: TrainResult, evaluated: Evaluation, registered: ModelVersion
) -> Summary:
    return summary.model_copy(
        update={
            "accuracy": evaluated.accuracy,
            "weights_sha256": trained.weights_sha256,
            "model_version": registered.version,
            "world_size": trained.world_size,
            "train_seconds": round(trained.train_seconds, 3),
            "images_per_second": round(trained.images_per_second, 1),
            "mlflow_tracking_uri": tracking_uri(),
            "mlflow_run_id": run.run_id,
            "mlflow_run_url": run.url,
            "checkpoint_prefix": run.checkpoint_prefix,
        }
    )


class _StepTimer:
    """Measures the seconds of each step: a call ends a step and returns its output."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()
        self.seconds: dict[str, float] = {}

    def __call__(self, step: str, output: Output) -> Output:
        now = time.monotonic()
        self.seconds[step], self._last = round(now - self._last, 3), now
        return output

    @property
    def total(self) -> float:
        return round(time.monotonic() - self._began, 3)
