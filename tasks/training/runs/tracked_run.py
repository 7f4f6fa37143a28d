"""The MLflow run of a training: opens before the ranks start and closes with the flow, however the flow ends."""

import contextlib
import resource
import threading
from collections.abc import Iterator, Mapping
from functools import partial

import httpx
from prefect.runtime import flow_run as running_flow

from cnn.data.manifest import Manifest
from cnn.training.order import mixing, shuffle_window
from cnn.training.trainer import check_fits
from infra.errors import ServiceError, UsageError
from infra.records import Record
from infra.storage import bucket_layout
from infra.storage.object_store import open_bucket
from infra.tracking import mlflow_runs, tags
from infra.tracking.client import check_server
from infra.tracking.promotion_history import this_user
from infra.tracking.provenance import Provenance, provenance
from tasks.config.run import RunConfig, with_network_options
from tasks.data.dataset import DatasetRef, load_manifest
from tasks.orchestration.cancellation import STOPPED, Cancelled, Superseded
from tasks.orchestration.flow_runs import flow_run_id, is_deployed, label_flow_run, page_of
from tasks.orchestration.progress import run_logger
from tasks.orchestration.retries import outlast
from tasks.training.liveness import hold_run_lock
from tasks.training.platform import differences, flatten, this_machine
from tasks.training.protocol.board import Board
from tasks.training.runs.run_record import RunManifest, RunRecord, check_resumable, inputs_of, read_record, run_of_flow

_checking = threading.Lock()
"""Trying a network uses PyTorch's global state and standard error; a sweep's trials do it in threads."""


class Interrupted(RuntimeError):
    """A signal asked the ranks to stop, and they stored a checkpoint."""

    exit_status = 75
    resumable = True


class TrackedRun(Record):
    """An open MLflow run."""

    run_id: str
    manifest_digest: str
    code_digest: str
    checkpoint_prefix: str


@contextlib.contextmanager
def tracked_run(
    config: RunConfig,
    dataset: DatasetRef,
    resume: str | None = None,
    *,
    trial: bool = False,
    sweep: Mapping[str, str] | None = None,
) -> Iterator[TrackedRun]:
    """Opens the run, and closes it as FINISHED, KILLED (cancelled, interrupted) or FAILED.

    A finished run is never opened again: if its version waits for approval, it is only read.

    Args:
        resume: id of the run to resume. By default, if Prefect runs this flow run again, its earlier MLflow run; if
            that has finished, it is only read, for the rest of the flow.
        trial: the run is in an experiment of its own, and never gets a version.
        sweep: tags of one of the runs that a sweep works on at the same time, in one flow run. It is closed as KILLED
            in any case, since it may go on later.

    Raises:
        ServiceError: the tracking server cannot be reached.
        InputError: the configuration does not fit the dataset; no run is opened.
        UsageError: the run to resume has other code, data or configuration, has finished, or another process works on
            it.
    """
    store = open_bucket()
    data = load_manifest(store, dataset.version)
    with _checking:
        check_fits(config.training(), data)
        manifest = run_manifest(config, dataset)
    outlast(check_server)  # it may be away after hours of packing
    flow_run = flow_tags().get(tags.FLOW_RUN, "")
    asked, resume = resume, resume or (None if sweep else run_of_flow(flow_run))
    finished = False
    with contextlib.ExitStack() as alive:
        if resume:
            _check_equal(resume, read_record(resume).manifest, manifest)
            run_id = resume
            alive.enter_context(hold_run_lock(run_id, flow_run))
            if asked and not sweep:
                check_resumable(run_id, trial=trial)  # again: until now another process may have trained it
            finished = mlflow_runs.run_status(run_id) == "FINISHED"
            if not finished:
                outlast(Board(store, run_id).clear)  # nodes of a coordinator that was killed end their ranks
                mlflow_runs.set_tags(run_id, flow_tags())  # first, so that no worker closes it for its earlier flow run
                mlflow_runs.reopen_run(run_id)
        else:
            run_id = mlflow_runs.start_run(
                experiment=f"{dataset.name} trials" if trial else dataset.name,
                run_name=f"trial {sweep[tags.SWEEP_TRIAL]}" if sweep else f"{config.model} {config.epochs} epochs",
                params=flatten({"dataset": config.dataset, "data": config.data.model_dump(), **manifest.config}),
                tags=_tags(config, dataset, manifest, provenance())
                | ({tags.TRIAL: "true"} if trial else {})
                | dict(sweep or {}),
            )
            alive.enter_context(hold_run_lock(run_id, flow_run))
        try:
            if not sweep:
                with contextlib.suppress(httpx.HTTPError):  # for `convoy retrain --wait` only
                    label_flow_run({tags.MLFLOW_RUN: run_id})
            prefix = store.uri(bucket_layout.checkpoints(run_id))
            if not resume:
                record = RunRecord(config=config, dataset=dataset, manifest=manifest).model_dump_json().encode()
                begun = {tags.CHECKPOINT_PREFIX: prefix, **_mixing_tags(config, data)}
                source = store.uri(bucket_layout.dataset_manifest(dataset.version))
                outlast(partial(mlflow_runs.set_tags, run_id, begun))
                outlast(partial(mlflow_runs.log_dataset, run_id, dataset.name, dataset.version, source))
                outlast(partial(mlflow_runs.log_text, run_id, "manifest.json", manifest.model_dump_json(indent=2)))
                # Last, since from here on the run can be resumed.
                outlast(partial(store.put_if_absent, bucket_layout.run_record(run_id), record))
            yield TrackedRun(
                run_id=run_id,
                manifest_digest=manifest.digest,
                code_digest=manifest.code_digest,
                checkpoint_prefix=prefix,
            )
        except BaseException as error:
            stopped = isinstance(error, (*STOPPED, Interrupted))
            if stopped and not isinstance(error, Interrupted) and not sweep:  # others' messages say it
                by_itself = is_deployed() and not isinstance(error, Cancelled)
                by_hand = "nothing goes on with it" if trial else f"`convoy resume {run_id}` goes on, no worker does"
                after = "a worker goes on with it" if by_itself else by_hand
                run_logger().warning("run %s has stopped; %s", run_id, after)
            with contextlib.suppress(ServiceError):  # if the server failed, the first error explains more
                if not finished and not isinstance(error, Superseded):  # the run may be another flow run's by now
                    mlflow_runs.end_run(run_id, "KILLED" if stopped else "FAILED")
            raise
        if not finished:
            outlast(partial(mlflow_runs.end_run, run_id, "KILLED" if sweep else "FINISHED"))


def _mixing_tags(config: RunConfig, data: Manifest) -> dict[str, str]:
    """Returns tags on how evenly batches are mixed; none if all images are mixed at a time."""
    train = data.splits["train"]
    window = shuffle_window(config.training(), train)
    if window is None:
        return {}
    uneven = mixing(train, window, batch_size=config.batch_size, lanes=config.lanes)
    run_logger().info(
        "%d of %d images are mixed at a time: a class's share of a batch varies up to %.2f times as much as at random",
        window,
        train.count,
        uneven,
    )
    return {tags.SHUFFLE_WINDOW: str(window), tags.MIXING: f"{uneven:.4g}"}


def run_manifest(config: RunConfig, dataset: DatasetRef) -> RunManifest:
    """Returns the manifest of a training on this machine's kind of device."""
    return RunManifest(**this_machine(), **inputs_of(config, dataset))


def log_cost(run_id: str, step_seconds: Mapping[str, float], rank_hours: float) -> None:
    """Logs the metrics `work/...` of a training: seconds per step, hours of all ranks, and memory.

    MLflow shows groups by name: this one comes after `test`, `train` and `val`. Earlier runs have these
    metrics as `cost/...`.

    `peak_memory_bytes` is the largest resident memory of a process that this one has started: in general a rank, with
    the pages of the data set that it shares with other ranks.
    """
    figures = {f"work/{step.replace('-', '_')}_seconds": value for step, value in step_seconds.items()}
    memory = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    figures |= {"work/rank_hours": rank_hours, "work/peak_memory_bytes": memory}
    outlast(partial(mlflow_runs.log_metrics, run_id, figures))


def differs_here(run_id: str, *, code: bool = True) -> list[str]:
    """Returns what keeps a run from going on in this environment with equal weights; nothing if it can.

    Args:
        code: compare code and libraries too, and not only the machine.

    Raises:
        UsageError, InputError: its record or its network cannot be read here.
    """
    record = read_record(run_id)
    if not code:
        here = {name: value for name, value in this_machine().items() if name != "torch"}
        return differences(record.manifest.model_dump(include=set(here)), here)
    current = run_manifest(with_network_options(record.config), record.dataset)
    if record.manifest.digest == current.digest:
        return []
    return differences(record.manifest.model_dump(), current.model_dump())


def _check_equal(run_id: str, earlier: RunManifest, current: RunManifest) -> None:
    """Refuses a resume whose weights would belong to neither manifest."""
    if earlier.digest_format != current.digest_format:
        raise UsageError(
            f"run {run_id} cannot go on here: another version of Convoy started it, and its record of the code cannot "
            "be compared; resume it with that version, or train again"
        )
    if differing := differences(earlier.model_dump(), current.model_dump()):
        raise UsageError(f"run {run_id} cannot go on here, because its weights would differ: {'; '.join(differing)}")


def flow_tags() -> dict[str, str]:
    """Returns the tags of a run that name the flow run which works on it; none outside a flow run."""
    if not (flow := flow_run_id()):
        return {}
    return {tags.FLOW_RUN: str(flow), tags.FLOW_RUN_URL: page_of(flow)}


def _tags(config: RunConfig, dataset: DatasetRef, manifest: RunManifest, code: Provenance) -> dict[str, str]:
    return {
        tags.RESULT: "not evaluated",  # first, since MLflow shows tags in the order in which they were created
        tags.MODEL: config.name or dataset.name,
        tags.DATASET_VERSION: dataset.version,
        tags.CODE_DIGEST: manifest.code_digest,
        tags.MANIFEST_DIGEST: manifest.digest,
        tags.USER: this_user(),
        tags.SOURCE_NAME: f"convoy {running_flow.flow_name}",
        **code.as_tags(),
        **flow_tags(),
    }
