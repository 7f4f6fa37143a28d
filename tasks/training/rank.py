"""The program that every rank of a training runs; torchrun starts it (see tasks/training/supervisor.py).

    python -m tasks.training.torchrun ... -m tasks.training.rank FOLDER [STORE]

FOLDER holds the job (tasks/training/protocol/job.py). STORE is a file for the rendezvous of ranks that are all on this
machine; other ranks use torchrun's own store. The training goes on from its newest checkpoint, if it has one.
"""

import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from cnn.distributed.process_group import EXCHANGE_TIMEOUT, make_deterministic, process_group
from cnn.errors import InputError
from cnn.networks.own import network_files
from cnn.training.arithmetic import peak
from cnn.training.loop import fit
from cnn.training.reports import EpochReport, StepReport
from cnn.training.stragglers import StragglerWatch
from cnn.training.trainer import Trainer
from cnn.training.training_state import restore, take_state
from infra.errors import counted
from infra.machine.files import OnBytes
from infra.machine.lifeline import TORCHRUN_PID, die_with_parent, name_process
from infra.machine.output import outlive_readers
from infra.storage import bucket_layout
from infra.storage.cache import Cache
from infra.storage.object_store import ObjectStore, open_bucket
from tasks.data.dataset import load_manifest, open_cache, open_split
from tasks.data.training_split import open_training_split
from tasks.orchestration.outage import through_outage
from tasks.training.checkpoints import CheckpointWriter, Snapshot, commit_weights, newest_checkpoint
from tasks.training.platform import joined_digest, loaded_code
from tasks.training.protocol.board import Board
from tasks.training.protocol.job import Event, Job, JobFolder, Outcome, print_line
from tasks.training.protocol.patience import CHECKPOINT_MAX, METRICS_WAIT, SLACK, STOP_STEP_WAIT
from tasks.training.utilisation import Utilisation

if TYPE_CHECKING:
    from tasks.training.trace import Trace

SPEED_SPAN = 0.5  # minimum of seconds that a speed is measured over
OUTAGE_SECONDS = EXCHANGE_TIMEOUT.total_seconds() - 60.0  # of the storage, in which a rank waits for data

Result = TypeVar("Result")


class StopSignal:
    """Records a SIGTERM, so that the ranks agree on a step to stop at; ends a process that does not reach it in time.

    Before the ranks' rendezvous there is nothing to lose, and no rank to agree with: then SIGTERM ends the process
    immediately. A thread receives the signal: Python runs no handler while the main thread waits, inside PyTorch, for a
    dead rank.
    """

    def __init__(self) -> None:
        self._received, self._ends_by, self._met = False, 0.0, False
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer)
        signal.signal(signal.SIGTERM, lambda *_: None)
        threading.Thread(target=self._watch, args=(reader,), name="stop-signal", daemon=True).start()

    def __call__(self) -> bool:
        return self._received

    def ranks_have_met(self) -> None:
        """Gives the ranks time to agree after a SIGTERM, from now on."""
        self._met = True

    def set_deadline(self, seconds: float) -> None:
        """Sets how many seconds from now this process may live after a SIGTERM, received or to come."""
        self._ends_by = time.monotonic() + seconds

    def _watch(self, reader: int) -> None:
        while os.read(reader, 1) != bytes([signal.SIGTERM]):
            pass
        self._received = True
        if self._met:
            self._ends_by = max(self._ends_by, time.monotonic() + STOP_STEP_WAIT)
        while (left := self._ends_by - time.monotonic()) > 0:
            time.sleep(min(left, 0.5))
        os._exit(1)


class Speed:
    """Measures images per second of all ranks together, over spans of steps; time between spans does not count."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._step, self._since = 0, time.perf_counter()
        self._images, self._seconds = 0, 0.0

    def begin(self, step: int) -> None:
        """Begins a span after the given number of steps."""
        self._step, self._since = step, time.perf_counter()

    def measure(self, step: int, *, at_least: float) -> float | None:
        """Returns the speed since the last call; None after less than `at_least` seconds, or without a new image."""
        seconds, images = time.perf_counter() - self._since, (step - self._step) * self._batch_size
        if seconds < at_least or not images:
            return None
        self._images += images
        self._seconds += seconds
        self.begin(step)
        return images / seconds

    @property
    def mean(self) -> float:
        """Mean speed of all spans; 0.0 if there was none."""
        return self._images / self._seconds if self._seconds else 0.0


class UtilisationMeter:
    """Adds up the times of a training's steps on this start of the ranks."""

    def __init__(self) -> None:
        self._seconds = self._data = self._exchange = 0.0

    def add(self, report: StepReport) -> None:
        """Adds the steps of a report, if their times are known."""
        if times := report.rank_seconds:
            waited = report.exchange_seconds if len(times) > 1 else 0.0  # a single rank has nobody to wait for
            self._seconds += report.steps * (sum(times) / len(times) + waited)
            self._data += report.steps * report.data_seconds
            self._exchange += report.steps * waited

    def result(self, peak_share: float) -> Utilisation | None:
        """Returns the shares; None if no time is known."""
        if not self._seconds:
            return None
        data, exchange = self._data / self._seconds, self._exchange / self._seconds
        shares = {"peak_share": peak_share, "data_share": data, "exchange_share": exchange}
        return Utilisation(**{name: float(f"{share:.3g}") for name, share in shares.items()})  # a little is not zero


class WarningForwarder(logging.Handler):
    """Forwards warnings of `infra`, for example about damaged files, to the log and the train task."""

    def __init__(self, folder: JobFolder) -> None:
        super().__init__(logging.WARNING)
        self._folder = folder

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(record.getMessage(), file=sys.stderr)
            self._folder.write_event(Event(warning=record.getMessage()))
        except OSError:  # a full disk is no reason to end the training
            self.handleError(record)


class SilentReporter:
    """Reporter of all ranks but rank 0."""

    def on_step(self, report: StepReport) -> None: ...

    def on_epoch(self, report: EpochReport) -> None: ...

    def after_step(self, trainer: Trainer, *, milestone: bool) -> None: ...


class RankZero:
    """Reporter of rank 0: reports to the tracking server and the train task, and stores checkpoints."""

    def __init__(self, job: Job, folder: JobFolder, store: ObjectStore) -> None:
        # These take seconds to import, and only rank 0 needs them.
        from infra.tracking import metric_log, system_metrics

        os.environ.update(metric_log.ONE_TRY_PER_REQUEST)
        self._job, self._folder, self._store = job, folder, store
        self._metriclog, self._systemmetrics = metric_log, system_metrics
        self._watch = StragglerWatch()
        self._seconds_before = self._rank_seconds_before = 0.0
        self._began = time.perf_counter()
        self._speed = Speed(job.config.batch_size)
        self._meter = UtilisationMeter()
        self._trace: Trace | None = None

    def resume(self) -> dict[str, Tensor] | None:
        """Returns the state of the newest checkpoint, if there is one; opens the metrics and the checkpoint writer."""
        job, folder = self._job, self._folder.path
        found = through_outage(
            lambda: newest_checkpoint(self._store, job.run_id, job.manifest_digest, self.warn, folder),
            self.warn,
            OUTAGE_SECONDS,
        )
        backlog: tuple[dict[str, Any], ...] = ()
        if found:
            self._seconds_before, self._rank_seconds_before = found[0].train_seconds, found[0].rank_seconds
            backlog = found[0].metrics
        rows = [self._metriclog.MetricRow.model_validate(row) for row in backlog]
        # An earlier start of the ranks may have logged steps without leaving a checkpoint.
        self._metrics = self._metriclog.MetricLogger(self._job.run_id, backlog=rows, is_current=self._is_current)
        self._system = self._systemmetrics.SystemMetrics(self._metrics)
        self._system.start()
        self._writer = CheckpointWriter(
            self._store,
            self._job,
            self._folder.path,
            self._job.checkpoints,
            on_trouble=self.warn,
            resumed=found[0].step if found else 0,
        )
        return found[1] if found else None

    def start(self, trainer: Trainer, peak: float) -> None:
        """Begins to measure the time and speed of the training, and reports from which step it goes on.

        Args:
            peak: floating-point operations per second that all ranks together can do at most.
        """
        self._trainer, self._peak = trainer, peak
        if self._job.profile:
            from tasks.training.trace import Trace  # loads torch.compile

            self._trace = Trace(self._job.profile, self._folder.trace)
        waiting = f"going on after step {trainer.step}" if trainer.step else "computing the first step"
        self._folder.write_event(Event(step=trainer.step, total_steps=trainer.total_steps, waiting=waiting))
        self._began = time.perf_counter()
        self._speed.begin(trainer.step)

    def store_last(self, step: int, stop: StopSignal) -> int:
        """Stores the checkpoint of a stop; returns the step of the last stored one, which is earlier if this fails.

        Args:
            step: at which the ranks have stopped.
            stop: receives the process's new deadline.
        """
        patience = self._writer.patience
        stop.set_deadline(patience + METRICS_WAIT + SLACK)
        self._folder.mark_stopped()
        if not self._writer.close(patience):
            kept = f"the last stored one is of step {self._writer.committed}"
            self.warn(f"the checkpoint of step {step} could not be stored within {patience:.0f} s; {kept}")
        return self._writer.committed

    def end_checkpoints(self) -> None:
        """Ends the storing of checkpoints once the weights are stored."""
        self._writer.end()

    def close(self) -> tuple[dict[str, Any], ...]:
        """Sends the metrics that are still queued; returns the rows that the tracking server did not acknowledge."""
        if self._trace:
            self._trace.close()
        self._system.stop()
        rows = self._metrics.close(METRICS_WAIT)
        if rows:
            print_line(f"{counted(len(rows), 'row')} of metrics not yet delivered to the tracking server")
        return tuple(row.model_dump(mode="json") for row in rows)

    def seconds(self) -> dict[str, float]:
        """Returns the training time of this and of earlier starts of the ranks, for an `Outcome` or a `Snapshot`."""
        here = time.perf_counter() - self._began
        ranks = here * _world_size()
        return {"train_seconds": self._seconds_before + here, "rank_seconds": self._rank_seconds_before + ranks}

    @property
    def images_per_second(self) -> float:
        """Returns the speed of all ranks together, without validation."""
        return self._speed.mean

    @property
    def utilisation(self) -> Utilisation | None:
        """Returns what the devices did with their time in this start of the ranks."""
        return self._meter.result(self._peak_share(self._speed.mean))

    def _peak_share(self, speed: float) -> float:
        return speed * self._trainer.operations_per_image / self._peak

    def warn(self, message: str) -> None:
        """Prints a warning to the log, and sends it to the train task."""
        print_line(message)
        self._folder.write_event(Event(warning=message))

    def on_step(self, report: StepReport) -> None:
        epoch_ends = report.step % self._trainer.steps_per_epoch == 0  # validation may follow
        measured = self._speed.measure(self._trainer.step, at_least=SPEED_SPAN / 10 if epoch_ends else SPEED_SPAN)
        speed = {} if measured is None else {"images_per_second": measured}
        figures = {
            "train/loss": report.loss,
            "train/accuracy": report.accuracy,
            "train/learning_rate": report.learning_rate,
            "train/gradient_norm": report.gradient_norm,
            **{f"train/{name}": value for name, value in speed.items()},
        }
        if measured is not None:
            figures["train/gflops_per_second"] = measured * self._trainer.operations_per_image / 1e9
            figures["train/peak_share"] = self._peak_share(measured)
        if times := sorted(report.rank_seconds):
            figures |= {
                "train/rank_seconds_min": times[0],
                "train/rank_seconds_median": times[(len(times) - 1) // 2],
                "train/rank_seconds_max": times[-1],
                "train/data_wait_seconds": report.data_seconds,
                "train/exchange_wait_seconds": report.exchange_seconds,
            }
            self._meter.add(report)
            for rank in self._watch.check(report):
                self.warn(f"rank {rank} is slow: {report.rank_seconds[rank]:.3f} s per step, others {times[0]:.3f} s")
        self._metrics.log(report.step, figures)
        self._event(report.step, loss=report.loss, **speed)

    def on_epoch(self, report: EpochReport) -> None:
        figures = {
            "val/loss": report.val.loss,
            "val/accuracy": report.val.accuracy,
            "epoch": float(report.epoch),
        }
        self._metrics.log(report.step, figures, keep=True)
        self._event(report.step, val_accuracy=report.val.accuracy)
        self._speed.begin(report.step)

    def after_step(self, trainer: Trainer, *, milestone: bool) -> None:
        if self._trace:
            self._trace.step_done()
        if not (milestone or self._writer.is_due()):
            return
        for report in trainer.reports.until(trainer.step):
            self.on_step(report)
        if trainer.reports.broken_step <= trainer.step:  # all ranks are about to notice
            return
        self._writer.save(
            Snapshot(
                step=trainer.step,
                state=take_state(trainer),
                val_accuracy=trainer.history[-1].accuracy if trainer.validates else None,
                **self.seconds(),
                metrics=tuple(row.model_dump(mode="json") for row in self._metrics.unacknowledged()),
            )
        )

    def _is_current(self) -> bool:
        return self._job.launch.launcher == "local" or is_current(Board(self._store, self._job.run_id))

    def _event(self, step: int, **values: float) -> None:
        epoch = (step - 1) // self._trainer.steps_per_epoch + 1
        self._folder.write_event(Event(step=step, total_steps=self._trainer.total_steps, epoch=epoch, **values))


def is_current(board: Board) -> bool:
    """Checks whether this rank's generation is still the current one; behind a cut link, it may have been given up.

    Raises:
        ServiceError: the storage failed.
    """
    order = board.order()
    return order is not None and order.generation == os.environ["TORCHELASTIC_RUN_ID"]


def main() -> int:
    name_process(f"rank-{os.environ.get('RANK', 0)}")
    die_with_parent(int(os.environ[TORCHRUN_PID]))
    stop = StopSignal()
    folder = JobFolder(Path(sys.argv[1]))
    job = folder.read_job()
    logging.getLogger("infra").addHandler(WarningForwarder(folder))
    try:
        train(job, folder, _rendezvous_store(sys.argv[2:]), stop)
    except Exception as error:
        if status := getattr(error, "exit_status", None):
            kind, resumable = getattr(error, "status", "failed"), getattr(error, "resumable", False)
            folder.write_outcome(Outcome(status=kind, error=str(error), exit_status=status, resumable=resumable))
        else:
            folder.write_outcome(Outcome(status="crashed", error=f"{type(error).__name__}: {error}", exit_status=1))
            print_line(traceback.format_exc())
        os._exit(1)  # without teardown, which might wait for ranks that wait for this one
    return 0


def _patiently(work: Callable[[], Result]) -> Result:
    """Returns the result of `work`, which needs the storage, also after an outage; other ranks wait as long."""
    return through_outage(work, logging.getLogger("infra.storage").warning, OUTAGE_SECONDS)


class PatientCache(Cache):
    """The cache of a rank, which fetches what it lacks also after an outage of the storage."""

    def fetch(self, key: str, sha256: str, *, size: int | None = None, on_progress: OnBytes | None = None) -> Path:
        return _patiently(lambda: super(PatientCache, self).fetch(key, sha256, size=size, on_progress=on_progress))


def train(job: Job, folder: JobFolder, rendezvous: dist.Store | None, stop: StopSignal) -> None:
    """Trains to the end, or until the ranks agree to stop; rank 0 stores the weights and writes the outcome."""
    check_code(job)
    if os.environ.get("RANK") == "0":
        folder.write_event(Event(waiting="loading the data"))
    store = _patiently(open_bucket)
    cache = open_cache(store, PatientCache)
    manifest = _patiently(partial(load_manifest, store, job.dataset_version))
    train_split = open_training_split(cache, manifest, job.config, _world_size())
    val_split = open_split(cache, manifest, "val")

    weights = job.config.pretrained_sha256
    make_deterministic(tf32=job.config.precision == "tf32")
    with process_group(rendezvous) as (device, exchange):
        stop.ranks_have_met()
        peak_here = peak(device, bfloat16=job.config.precision == "bfloat16")
        first = RankZero(job, folder, store) if exchange.rank == 0 else None
        state = first.resume() if first else None
        trainer = Trainer(
            job.config,
            manifest=manifest,
            train_split=train_split,
            val_split=val_split,
            device=device,
            exchange=exchange,
            pretrained=cache.fetch(bucket_layout.pretrained_weights(weights), weights) if weights else None,
            stop_requested=stop,
        )
        restore(trainer, state)
        if first is None:
            if not fit(trainer, SilentReporter(), until_epoch=job.until_epoch):
                stop.set_deadline(CHECKPOINT_MAX + METRICS_WAIT + SLACK)  # NCCL waits for rank 0's checkpoint
            return
        first.start(trainer, peak_here * exchange.world_size)
        try:
            finished = fit(trainer, first, until_epoch=job.until_epoch)
        except BaseException:
            first.close()
            raise
        until = job.until_epoch and job.until_epoch * trainer.steps_per_epoch
        paused = not finished and trainer.step == until
        outcome = Outcome(
            status="finished" if finished else "paused" if paused else "interrupted",
            steps=trainer.step if finished else first.store_last(trainer.step, stop),
            world_size=exchange.world_size,
            **first.seconds(),
            images_per_second=first.images_per_second,
            utilisation=first.utilisation,
        )
        rows = first.close()
        if finished or paused:
            score = trainer.selected if finished else trainer.history[-1]
            found = {"val_accuracy": score.accuracy, "val_loss": score.loss}
            outcome = outcome.model_copy(update=found | {"metrics": rows})  # after a stop, the checkpoint has the rows
        if finished:
            state, unplaced = trainer.weights(), outcome
            # As long as for a checkpoint: the weights are worth more than one. No other rank waits for this one.
            patience = max(OUTAGE_SECONDS, job.checkpoints.patience)
            outcome = through_outage(
                lambda: commit_weights(store, job, state, folder.weights, unplaced), first.warn, patience
            )
            first.end_checkpoints()
        folder.write_outcome(outcome)


def check_code(job: Job) -> None:
    """Raises InputError if this process has loaded other code than that which the training began with.

    Convoy, or the files of a network of one's own, may have changed before a restart of the ranks, and this node may
    have other files than the flow's machine.
    """
    here = network_files(job.config.model)
    changed = sorted({file for file, _ in job.network_files.items() ^ here.items()})
    if changed:
        changed[0] = f"{job.config.model}: {changed[0]}"
    elif joined_digest(loaded_code(), here) != job.code_digest:
        changed = ["Convoy's code"]
    if changed:
        raise InputError(
            f"{', '.join(changed)} changed after this training had begun; "
            "train again, or restore what it began with and call `convoy resume`"
        )


def _rendezvous_store(arguments: list[str]) -> dist.Store | None:
    return dist.FileStore(arguments[0], _world_size()) if arguments else None


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun


if __name__ == "__main__":
    with outlive_readers("stdout", "stderr"):  # the log's disk may be full
        sys.exit(main())
