"""The training flow: download, preprocess, check, train, evaluate, register, try, judge, release."""

import time

from prefect import flow, states
from prefect.runtime import flow_run
from prefect.utilities.urls import url_for

from flows.approval import ask
from flows.summary import Summary
from infra import tracking
from infra.errors import GateRefused
from infra.registry import ModelVersion
from infra.versions import find_version
from tasks.cancel import Cancelled
from tasks.config import RunConfig
from tasks.datagate import DataRefused, data_gate, log_data_report
from tasks.download import download
from tasks.evaluate import Evaluation, evaluate
from tasks.modelcard import write_model_card
from tasks.page import publish_page
from tasks.preprocess import preprocess
from tasks.pretrained import pretrained
from tasks.promote import champion_data
from tasks.qualitygate import QualityRefused, quality_gate
from tasks.register import register
from tasks.release import release
from tasks.run import TrackedRun, fitted, read_record, recorded_dataset, tracked_run
from tasks.servinggate import serving_gate
from tasks.train import TrainResult, train


@flow(name="train", flow_run_name="{config.dataset} {config.model}", persist_result=False)
def train_flow(config: RunConfig, refresh: frozenset[str] = frozenset(), resume: str | None = None) -> Summary:
    """Train a network on a dataset, register it, and release it if it passes its gates.

    A gate that refuses is no failure: the flow run ends as completed, in a state called Refused.

    Args:
        config: what to train on, and how.
        refresh: steps (`download`, `preprocess`) to do anew although their output exists.
        resume: id of the MLflow run of an earlier, unfinished training to go on with.
    """
    began = time.monotonic()
    tracking.check_server()  # before hours of work, rather than after
    reused: tuple[str, ...]
    if resume:
        dataset, reused = recorded_dataset(read_record(resume)), ("download", "preprocess")
    else:
        source = download(config.dataset, refresh="download" in refresh)
        dataset = preprocess(source, config.data, refresh="preprocess" in refresh)
        reused = tuple(step for step, output in (("download", source), ("preprocess", dataset)) if output.reused)
        config = fitted(config, dataset)
        if config.pretrained:
            config = pretrained(config, dataset)
    name = config.name or dataset.name
    summary = Summary(
        status="done",
        dataset=config.dataset,
        dataset_version=dataset.version,
        reused=reused,
        prefect_flow_run_id=flow_run.id,
        prefect_flow_run_url=url_for("flow-run", obj_id=flow_run.id),
    )
    try:
        checked = data_gate(dataset, config.data_gate, champion_data(name))
        with tracked_run(config, dataset, resume) as run:
            log_data_report(run.run_id, checked)
            trained = train(run, dataset, config)
            evaluated = evaluate(config.training(), dataset, trained)
            registered = register(name, config.training(), dataset, trained, evaluated)
            write_model_card(registered, config, dataset, trained, evaluated)
            summary = _with_version(summary, run, trained, evaluated, registered)
            summary = _through_gates(summary, config, registered, evaluated)
            publish_page(find_version(registered.address))
    except DataRefused as refused:
        summary = _refused(summary, refused)
    except Cancelled as cancelled:
        # Prefect lets a cancelled run end in this state only; the caller is raised `cancelled` from it.
        return states.Cancelled(message=str(cancelled), data=cancelled)  # type: ignore[return-value]
    summary = summary.model_copy(update={"total_seconds": round(time.monotonic() - began, 3)})
    if summary.status == "refused":
        return states.Completed(name="Refused", message=summary.error, data=summary)  # type: ignore[return-value]
    return summary


def _through_gates(summary: Summary, config: RunConfig, registered: ModelVersion, evaluated: Evaluation) -> Summary:
    """What came of trying, judging and releasing a version."""
    summary = summary.model_copy(update={"champion": False})
    try:
        serving_gate(registered, evaluated, config.serving)
        verdict = quality_gate(registered, config.gate)
        summary = summary.model_copy(update={"verdict": verdict.summary})
        if config.promotes:
            reason = ask(registered, verdict, config.approval_patience) if config.approval else ""
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
            "model_name": registered.name,
            "model_version": registered.version,
            "world_size": trained.world_size,
            "train_seconds": round(trained.train_seconds, 3),
            "images_per_second": round(trained.images_per_second, 1),
            "mlflow_tracking_uri": tracking.tracking_uri(),
            "mlflow_run_id": run.run_id,
            "mlflow_run_url": run.url,
            "checkpoint_prefix": run.checkpoint_prefix,
        }
    )
