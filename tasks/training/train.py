"""The train task: starts the ranks through the supervisor, shows their progress, and returns the trained weights."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import torch

from cnn.distributed.process_group import check_devices, device_count
from cnn.distributed.world_size import default_world_size
from cnn.networks.own import network_files
from infra.errors import counted
from infra.machine import stopping
from infra.records import Record
from infra.settings import Settings
from infra.storage.object_store import open_bucket
from infra.tracking import mlflow_runs
from infra.tracking.metric_log import MetricRow, deliver
from infra.tracking.model_registry import rehearsal
from infra.tracking.tags import WEIGHTS_SHA256, WORLD_SIZE
from tasks.config.launchers import Launch
from tasks.config.run import RunConfig
from tasks.data.dataset import DatasetRef
from tasks.orchestration.cancellation import Cancelled, CancelWatch, stop_if_cancelled
from tasks.orchestration.progress import Advance, progress, run_logger
from tasks.orchestration.retries import outlast
from tasks.orchestration.step import step
from tasks.training import liveness
from tasks.training.checkpoints import finished_outcome
from tasks.training.protocol.job import STARTING, Event, Job, JobFolder, Outcome, Restarts, spare_outcome
from tasks.training.protocol.patience import FLOW_WAIT
from tasks.training.runs.tracked_run import Interrupted, TrackedRun
from tasks.training.utilisation import Utilisation

POLL_SECONDS = 0.1  # seconds between two checks of the supervisor and its events


class TrainingFailed(RuntimeError):
    """The ranks failed. `exit_status` is 2 if the user's input was at fault, else 1.

    It is `resumable` if signals or an outage ended them; `diverged`, and would again, if a loss was not finite.
    """

    def __init__(self, message: str, exit_status: int, *, resumable: bool, diverged: bool = False) -> None:
        super().__init__(message)
        self.exit_status, self.resumable, self.diverged = exit_status, resumable, diverged


class TrainResult(Record):
    """A finished training."""

    run_id: str
    weights_key: str
    """Key of the safetensors weights in the bucket."""

    weights_sha256: str
    """Digest of the tensors in sorted name order (`cnn.networks.weights.weights_sha256`)."""

    world_size: int
    steps: int
    train_seconds: float
    rank_seconds: float = 0.0
    """As in `Outcome`."""

    images_per_second: float
    """Speed of all ranks together, without validation."""

    utilisation: Utilisation | None = None
    val_accuracy: float
    val_loss: float


@step("train", retried=False)
def train(
    run: TrackedRun, dataset: DatasetRef, config: RunConfig, in_last_epoch: Callable[[], None] = lambda: None
) -> TrainResult:
    """Trains, from the run's newest checkpoint if it has one, and returns the committed weights.

    Args:
        in_last_epoch: called once the last epoch has begun, to prepare what comes after it.

    Raises:
        TrainingFailed: the ranks failed; the message says why.
        Cancelled: the flow run was cancelled; a checkpoint is stored, and no rank is left.
        Stopped: a signal asked this process to stop; likewise.
        Interrupted: a signal asked a rank to stop; likewise.
    """
    stop_if_cancelled()
    folder = JobFolder(Settings().runs / run.run_id)
    await_earlier_start(folder)
    store = outlast(open_bucket)
    if outcome := outlast(partial(finished_outcome, store, run.run_id)):
        run_logger().info("training of run %s has already finished", run.run_id)
        outlast(partial(store.get_file, outcome.weights_key, folder.weights))
        return _publish(run, outcome, folder)
    world_size = _world_size(config)
    folder.write_job(_job(run, dataset, config, world_size))
    total = float(config.epochs)
    where = counted(world_size, "rank") if config.launcher == "local" else f"up to {world_size} ranks of several nodes"
    with (
        rehearsal(folder.path),
        spare_outcome(),
        progress(f"Training on {where}", total, unit="epochs", artifact="training") as advance,
    ):
        display = _Display(advance, config.epochs)
        display(Event(waiting=STARTING if config.launcher == "local" else "waiting for nodes"))

        told = False

        def show(event: Event) -> None:
            nonlocal told
            display(event)
            if event.epoch == config.epochs and not told:
                told = True
                in_last_epoch()

        outcome = _run(folder, show)
    if not folder.weights.exists():  # rank 0 ran on another node
        outlast(partial(store.get_file, outcome.weights_key, folder.weights))
    return _publish(run, outcome, folder)


def train_to(
    run: TrackedRun,
    dataset: DatasetRef,
    config: RunConfig,
    epoch: int,
    *,
    ranks: int,
    show: Callable[[Event], None],
) -> Outcome:
    """Trains on this machine up to the end of an epoch, from the run's newest checkpoint if it has one.

    Args:
        show: called with what the ranks report.

    Returns:
        An outcome with the validation scores of that epoch, or of the selected one if the training is finished.

    Raises:
        TrainingFailed, Cancelled, Stopped, Interrupted: as `train`.
    """
    stop_if_cancelled()
    folder = JobFolder(Settings().runs / run.run_id)
    await_earlier_start(folder)
    outcome = finished_outcome(open_bucket(), run.run_id)
    if not outcome:
        job = _job(run, dataset, config, ranks)
        folder.write_job(job.model_copy(update={"until_epoch": epoch if epoch < config.epochs else None}))
        outcome = _run(folder, show)
    _deliver_metrics(run.run_id, outcome)  # now, since it may be the end of this run
    return outcome


def _job(run: TrackedRun, dataset: DatasetRef, config: RunConfig, world_size: int) -> Job:
    return Job(
        run_id=run.run_id,
        config=config.training(),
        dataset_version=dataset.version,
        world_size=world_size,
        launch=Launch.model_validate(config, from_attributes=True),
        manifest_digest=run.manifest_digest,
        code_digest=run.code_digest,
        network_files=network_files(config.model),
        checkpoints=config.checkpoints,
        restarts=config.restarts,
        profile=config.profile,
    )


def await_earlier_start(folder: JobFolder) -> None:
    """Waits until no process of an earlier start is left on this machine.

    After a flow is killed, its ranks still store a checkpoint. Their outcome would count as the next start's, and they
    would write to the same files.

    Raises:
        Stopped: a signal asked this process to end.
    """
    if liveness.processes_of(folder.path):
        run_logger().info("waiting for the processes of an earlier start of run %s to end", folder.path.name)
    while liveness.processes_of(folder.path):
        stopping.sleep(POLL_SECONDS)


def _world_size(config: RunConfig) -> int:
    """Returns the world size: exact on this machine, the maximum on several nodes.

    Raises:
        InputError: this machine has fewer GPUs.
    """
    if config.launcher != "local":
        return config.ranks or config.lanes
    devices = device_count()
    world_size = config.ranks or default_world_size(config.lanes, devices)
    check_devices(world_size)
    if torch.cuda.is_available() and config.lanes > world_size:
        run_logger().warning(
            "each GPU computes %d lanes, one after another: with lanes=%d training would be faster, and give other "
            "weights",
            config.lanes // world_size,
            world_size,
        )
    if (idle := devices - world_size) > 0:
        run_logger().warning(
            "%d of %d devices stay idle: %s for %d lanes", idle, devices, counted(world_size, "rank"), config.lanes
        )
    return world_size


def _publish(run: TrackedRun, outcome: Outcome, folder: JobFolder) -> TrainResult:
    """Logs the weights and the last metrics to the MLflow run, even if an earlier process was killed before."""
    _deliver_metrics(run.run_id, outcome)
    outlast(partial(mlflow_runs.log_file, run.run_id, folder.weights, "weights"))
    if folder.trace.exists():
        outlast(partial(mlflow_runs.log_file, run.run_id, folder.trace, "profile"))
    tags = {WEIGHTS_SHA256: outcome.weights_sha256, WORLD_SIZE: str(outcome.world_size)}
    outlast(partial(mlflow_runs.set_tags, run.run_id, tags))
    return TrainResult(run_id=run.run_id, **outcome.model_dump(exclude={"status", "error", "exit_status", "metrics"}))


def _deliver_metrics(run_id: str, outcome: Outcome) -> None:
    """Sends the rows that the ranks could not send; a second call does not store them again."""
    if rows := [MetricRow.model_validate(row) for row in outcome.metrics]:
        run_logger().info("sending %s of metrics that MLflow has not acknowledged", counted(len(rows), "row"))
        outlast(partial(deliver, run_id, rows))


def _run(folder: JobFolder, show: Callable[[Event], None]) -> Outcome:
    """Runs the supervisor to its end, and again if it was killed; returns the outcome of the finished training.

    Raises:
        TrainingFailed: the ranks failed.
        Interrupted: the ranks stopped.
        Cancelled: the flow run was cancelled.
    """
    restarts = Restarts(folder)
    while True:
        status = _supervise(folder, show)
        outcome = folder.read_outcome()
        if status >= 0 or (outcome and outcome.status != "crashed") or not restarts.take():
            break
        await_earlier_start(folder)  # the kernel kills the ranks after their supervisor
        reason = f"the supervisor was killed by signal {-status}"
        show(Event(warning=f"{reason}; starting again from the last checkpoint", waiting=STARTING))
        folder.start_again()
    if outcome and outcome.status in ("finished", "paused"):
        return outcome
    if outcome and outcome.status == "interrupted":
        reason = outcome.error or "interrupted"
        raise Interrupted(f"{reason} at step {outcome.steps}; `convoy resume {folder.path.name}` goes on")
    killed = folder.killed()
    if outcome is None or (outcome.status == "crashed" and killed):
        reason = f"the ranks died (see {folder.log}): {killed or folder.log_end()}"
        raise TrainingFailed(reason, exit_status=1, resumable=True)
    diverged = outcome.status == "diverged"
    raise TrainingFailed(outcome.error, outcome.exit_status, resumable=outcome.resumable, diverged=diverged)


def _supervise(folder: JobFolder, show: Callable[[Event], None]) -> int:
    """Runs one supervisor to its end; returns its status. If this raises, the supervisor still ends all ranks."""
    cancelled = CancelWatch()
    # In its own session, no Ctrl-C of the terminal reaches it: the end of its standard input is the signal to end.
    supervisor = subprocess.Popen(
        [sys.executable, "-m", "tasks.training.supervisor", str(folder.path)],
        env=os.environ | {"PYTHONSAFEPATH": "1"},  # else `-m` searches the user's folder first
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    assert supervisor.stdin is not None
    try:
        while supervisor.poll() is None:
            for event in folder.new_events():
                show(event)
            if cancelled():
                raise Cancelled("the flow run was cancelled; every rank is stopped")
            stopping.wait(POLL_SECONDS)
        for event in folder.new_events():  # written since the last check
            show(event)
    finally:
        supervisor.stdin.close()
        try:
            supervisor.wait(FLOW_WAIT)
        except subprocess.TimeoutExpired:
            supervisor.kill()  # torchrun and the ranks die with it
            supervisor.wait()
        for event in folder.new_events():  # on a stop: whether the last checkpoint could be stored
            if event.warning:
                run_logger().warning("%s", event.warning)
    return supervisor.returncode


class _Display:
    """Shows events as progress in epochs with a note, and as log messages."""

    def __init__(self, advance: Advance, epochs: int) -> None:
        self._advance, self._epochs, self._done = advance, epochs, 0.0
        self._parts: dict[str, str] = {}

    def __call__(self, event: Event) -> None:
        if event.warning:
            run_logger().warning("%s", event.warning)
        if event.note:
            run_logger().info("%s", event.note)
        done = self._epochs * event.step / event.total_steps if event.total_steps else self._done
        if event.waiting:
            self._advance(done - self._done, waiting=event.waiting)
            self._done = done
        if event.waiting or not event.step:
            return
        self._parts["epoch"] = f"epoch {event.epoch}/{self._epochs}"
        if event.loss is not None:
            self._parts["loss"] = f"loss {event.loss:.3f}"
        if event.val_accuracy is not None:
            self._parts["val"] = f"val {event.val_accuracy:.2%}"
        if event.images_per_second is not None:
            self._parts["speed"] = f"{event.images_per_second:,.0f} images/s"
        self._advance(done - self._done, " · ".join(self._parts.values()))
        self._done = done
