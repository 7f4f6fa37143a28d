"""The way of a training from its source to the champion: the table of contents of the flows `train` and `retrain`."""

import logging
import os
from contextlib import nullcontext
from functools import partial
from typing import Any

from prefect import states
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run

from flows.run_names import model_name
from flows.step_timer import StepTimer
from flows.summary import REFUSED, Refused, Summary
from infra.errors import GateRefused, UsageError
from infra.machine.output import outlive_readers
from infra.storage.object_store import open_bucket
from infra.tracking.client import check_server
from infra.tracking.provenance import COMMIT_VARIABLE
from tasks.config.launchers import check_installed
from tasks.config.run import RunConfig, Step, with_network_options
from tasks.config.sweep import SweepRequest
from tasks.data.dataset import DatasetRef, is_complete, load_manifest
from tasks.data.download import download
from tasks.data.preprocess import preprocess
from tasks.data.prune_mark import wait_for_prune
from tasks.orchestration.cancellation import Cancelled, sigterm_is_checked_for
from tasks.orchestration.failure import failure_told
from tasks.orchestration.flow_runs import enter_project, flow_is_alive, give_up_tries, page_of
from tasks.orchestration.messages import tell
from tasks.orchestration.model_lease import model_lease
from tasks.orchestration.retries import outlast
from tasks.release.retrain_decision import what_changed
from tasks.training.runs.run_record import check_resumable, read_record


def _is_no_refusal(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], Refused))


# A worker would log the end of a refused flow run as an unexpected exception, with a traceback.
logging.getLogger("prefect.flow_runs").addFilter(_is_no_refusal)


@outlive_readers("stdout", "stderr")  # the worker that reads the output may be killed
@flow_is_alive()
@sigterm_is_checked_for()
def train_and_release(
    config: RunConfig,
    refresh: frozenset[Step],
    resume: str | None = None,
    *,
    only_if_changed: bool = False,
    force: bool = False,
    trial: bool = False,
    sweep: SweepRequest | None = None,
) -> Summary | State[Summary]:
    """Goes from the source to a version that is champion if it passes its gates; returns the result of a flow.

    What comes of it is reported to Prefect as an event, which `convoy notify` sends to a chat.

    Args:
        config: the configuration of the run.
        refresh: steps (`download`, `preprocess`) to repeat although their output exists.
        resume: id of the MLflow run of an unfinished training to continue.
        only_if_changed: end after preprocessing if the champion was made of the same data, code and configuration.
        force: train in any case.
        trial: end after the evaluation, and without the model's lease: nothing is registered.
        sweep: first search for the best configuration, which then goes on.
    """
    minor = trial or config.data.limit is not None
    step_timer, found = StepTimer(), None
    try:
        with failure_told(minor=minor):
            if sweep:
                config, resume, found = _search(config, sweep, step_timer)
            summary = _train_and_release(
                config, refresh, resume, step_timer, only_if_changed=only_if_changed, force=force, trial=trial
            ).model_copy(update={"sweep": found})
    except GateRefused as refused:  # the data, before a sweep
        told = {"dataset": config.dataset, "model_name": model_name(config), "error": str(refused)}
        summary = Summary(status="refused", exit_status=refused.exit_status, **told)
    except Cancelled as cancelled:
        # Prefect lets a cancelled run end in this state only, and raises `cancelled` from it in the caller.
        return states.Cancelled(message=str(cancelled), data=cancelled)  # type: ignore[arg-type]
    if summary.news:
        tell(summary.news, summary.message, minor=minor and summary.news != "promoted")
    return _ended(summary)


def _search(config: RunConfig, asked: SweepRequest, step_timer: StepTimer) -> tuple[RunConfig, str, dict[str, Any]]:
    """Runs or resumes a sweep; returns the best configuration, its run, and what the sweep has found."""
    enter_project()
    check_server()
    if asked.resume:
        from tasks.training.sweep import read_sweep_record, sweep_best  # it loads PyTorch, likewise below

        record = read_sweep_record(asked.resume)
        _recorded_dataset(record.dataset)
    else:
        config, dataset, _ = _prepared(with_network_options(config), frozenset(), step_timer)
        from flows.candidate import checked_data
        from tasks.training.sweep import SweepRecord, sweep_best

        checked_data(config.name or dataset.name, config, dataset, warm=False)  # a refusal should not come hours later
        assert asked.sweep
        record = SweepRecord(config=config, dataset=dataset, sweep=asked.sweep)
    best, run_id, result = sweep_best(record, asked.resume, asked.at_once)
    outlast(check_server)  # after hours, an outage is waited for; before them, it is told at once
    step_timer("sweep", result)
    return best, run_id, result.model_dump()


def _prepared(
    config: RunConfig, refresh: frozenset[Step], step_timer: StepTimer
) -> tuple[RunConfig, DatasetRef, tuple[str, ...]]:
    """Downloads and packs the data; returns the configuration for them, the dataset, and the steps that were reused."""
    raw = download(config.dataset, config.data, refresh=Step.download in refresh)
    step_timer("download", raw)
    packed = preprocess(raw, config.data, max_default_size=config.max_default_size, refresh=Step.preprocess in refresh)
    dataset = step_timer("preprocess", packed)
    reused = tuple(step for step, output in (("download", raw), ("preprocess", dataset)) if output.reused)
    config = config.for_images(load_manifest(open_bucket(), dataset.version).splits["train"].count)
    if config.pretrained:
        config = _with_weights(config, config.pretrained, dataset)
    return config, dataset, reused


def _recorded_dataset(dataset: DatasetRef) -> DatasetRef:
    """Returns the data of a run to resume, once no prune may delete them; raises UsageError if parts are missing."""
    store = open_bucket()
    wait_for_prune(store)
    if not is_complete(store, dataset.version):
        raise UsageError(
            f"the bucket lacks parts of dataset version {dataset.version}: the run cannot go on; train again"
        )
    return dataset.model_copy(update={"reused": True})


@flow_is_alive()
@sigterm_is_checked_for()
def judge_trial(config: RunConfig, run_id: str) -> Summary | State[Summary]:
    """Judges the model of a trial as if it were a new version; returns the result of a flow.

    Args:
        config: of the deployment; the trial's own name and gate are ignored.
        run_id: the trial's MLflow run.
    """
    step_timer = StepTimer()
    name = model_name(config)
    with failure_told(minor=True):
        check_server()
        from tasks.release.trial import judge  # it loads PyTorch

        verdict = step_timer("quality-gate", judge(name, run_id, config.gate, config.data.slices))
    known = {"accuracy": verdict.accuracy, "gain": verdict.gain, "verdict": verdict.summary, "mlflow_run_id": run_id}
    summary = Summary(status="done", trial=True, dataset=config.dataset, model_name=name, **known)
    if not verdict.passed:
        refused = {"status": "refused", "exit_status": Refused.exit_status, "error": f"the gate {verdict.summary}"}
        summary = summary.model_copy(update=refused)
    return _ended(_finish(summary, step_timer))


def _train_and_release(
    config: RunConfig,
    refresh: frozenset[Step],
    resume: str | None,
    step_timer: StepTimer,
    *,
    only_if_changed: bool,
    force: bool,
    trial: bool,
) -> Summary:
    """Does what `train_and_release` describes; its summary is an artifact in Prefect."""
    enter_project()
    config = with_network_options(config)  # before hours of work; likewise:
    check_installed(config.launcher)
    check_server()
    reused: tuple[str, ...]
    if resume:
        dataset, reused = _recorded_dataset(read_record(resume).dataset), ("download", "preprocess")
    else:
        config, dataset, reused = _prepared(config, refresh, step_timer)
    name = config.name or dataset.name
    summary = Summary(
        status="done",
        dataset=config.dataset,
        dataset_version=dataset.version,
        model_name=name,
        reused=reused,
        commit=os.environ.get(COMMIT_VARIABLE),
        trial=trial or None,
        prefect_flow_run_id=flow_run.id,
        prefect_flow_run_url=page_of(flow_run.id),
    )
    with nullcontext() if trial else model_lease(name):
        if resume:
            check_resumable(resume, trial=trial)  # again: another process may have finished it while this one waited
        warm = False
        judge = None
        if only_if_changed and not resume:
            choice = step_timer("decide", what_changed(name, config, dataset, force=force))
            summary = summary.model_copy(update={"reason": choice.why})
            if not choice.train and not choice.judge:
                return _finish(summary.model_copy(update={"status": "unchanged"}), step_timer)
            judge = choice.judge
            if config.warm_start and choice.champion_weights and not config.pretrained and not judge:
                same = config.model_copy(update=choice.champion_normalisation)
                config = _with_weights(same, choice.champion_weights, dataset)
                warm = True
        from flows.candidate import judge_again, train_version, try_out, with_approval  # only now: they load PyTorch

        if trial:
            return _finish(try_out(summary, config, dataset, resume, step_timer), step_timer)
        if judge:
            summary = judge_again(summary, config, judge)
        else:
            summary = train_version(summary, config, dataset, resume, step_timer, warm=warm)
    if summary.status == "done" and config.promotes and config.approval:
        # Without the lease, so that others may train this model meanwhile.
        summary = with_approval(summary, config, step_timer)
    return _finish(summary, step_timer)


def _with_weights(config: RunConfig, address: str, dataset: DatasetRef) -> RunConfig:
    from tasks.training.pretrained import pretrained  # it loads PyTorch

    return pretrained(config.model_copy(update={"pretrained": address}), dataset)


def _finish(summary: Summary, step_timer: StepTimer) -> Summary:
    """Adds the times, and stores the summary in Prefect as an artifact."""
    summary = summary.model_copy(update={"total_seconds": step_timer.total, "step_seconds": step_timer.seconds})
    rows = [{"name": name, "value": value} for name, value in summary.as_dict().items()]
    # A promotion may have been its last step: an outage of Prefect must not make a failure of it.
    outlast(partial(create_table_artifact, rows, key="summary", description=summary.headline))
    return summary


def _ended(summary: Summary) -> Summary | State[Summary]:
    """Returns the summary in a Prefect state with a fitting name."""
    if summary.status == "refused":
        give_up_tries()  # the gate would refuse again; a second `retrain` would find nothing to do, and end as Skipped
        # Not green, so that nobody takes it for a success. Prefect raises the data in the caller of the flow.
        return states.Failed(name=REFUSED, message=summary.headline, data=Refused(summary))  # type: ignore[arg-type]
    if summary.status == "done" and flow_run.run_count > 1:
        return summary  # after a retry in this process, Prefect raises the first try's error from a returned state
    name = "Skipped" if summary.status == "unchanged" else "Completed"
    return states.Completed(name=name, message=summary.headline, data=summary)
