"""The program that every rank of a training runs; torchrun starts it (see tasks/supervisor.py).

    python -m torch.distributed.run ... -m tasks.rank FOLDER MEETING

FOLDER holds the job (tasks/job.py); MEETING is a path where the ranks of this start find each other.
"""

import contextlib
import os
import sys
import time
from pathlib import Path

import torch.distributed as dist

from cnn.distributed import make_deterministic, process_group
from cnn.trainer import EpochReport, StepReport, Trainer, fit
from cnn.weights import save_weights
from infra.cache import Cache
from infra.objectstore import ObjectStore
from infra.settings import Settings
from tasks.checkpoints import commit_weights
from tasks.dataset import load_manifest, open_split
from tasks.job import Event, Job, JobFolder, Outcome
from tasks.lifeline import die_with_parent

REPORT_EVERY = 0.5  # seconds between reports of steps
FLUSH_PATIENCE = 60.0  # seconds that the tracking server has to take the last metrics


class Silent:
    """Reporter of the ranks that are not the first."""

    def on_step(self, report: StepReport) -> None: ...

    def on_epoch(self, report: EpochReport) -> None: ...


class RankZero:
    """Reporter of rank 0: to the tracking server and to the train task. Steps are reported as means.

    Use it as a context manager; leaving it sends what is left.
    """

    def __init__(self, job: Job, folder: JobFolder, trainer: Trainer) -> None:
        # They take seconds to import, and only rank 0 needs them.
        from infra.metriclog import ONE_TRY_A_REQUEST, MetricLogger
        from infra.systemmetrics import SystemMetrics

        os.environ.update(ONE_TRY_A_REQUEST)
        self._folder, self._trainer = folder, trainer
        self._metrics = MetricLogger(job.run_id)
        self._system = SystemMetrics(self._metrics)
        self._batch = job.config.batch_size
        self._since = time.perf_counter()
        self._pending: list[StepReport] = []
        self.training_seconds = 0.0
        self.last_epoch: EpochReport | None = None

    def __enter__(self) -> "RankZero":
        self._system.start()
        self._since = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._system.stop()
        if lost := self._metrics.close(FLUSH_PATIENCE):
            print(f"{len(lost)} metrics did not reach the tracking server", file=sys.stderr)

    def on_step(self, report: StepReport) -> None:
        self._pending.append(report)
        if time.perf_counter() - self._since >= REPORT_EVERY:
            self._report_steps()

    def on_epoch(self, report: EpochReport) -> None:
        if self._pending:
            self._report_steps()
        self.last_epoch = report
        figures = {
            "val/loss": report.val.loss,
            "val/accuracy": report.val.accuracy,
            "epoch": float(report.epoch),
        }
        self._metrics.log(report.step, figures, keep=True)
        self._folder.write_event(self._event(report.step, val_accuracy=report.val.accuracy))
        self._since = time.perf_counter()  # the time of the validation is not that of steps

    def _report_steps(self) -> None:
        now = time.perf_counter()
        seconds, count = now - self._since, len(self._pending)
        loss = sum(step.loss for step in self._pending) / count
        speed = count * self._batch / seconds
        last = self._pending[-1]
        figures = {
            "train/loss": loss,
            "train/accuracy": sum(step.accuracy for step in self._pending) / count,
            "train/learning_rate": last.learning_rate,
            "train/images_per_second": speed,
        }
        self._metrics.log(last.step, figures)
        self._folder.write_event(self._event(last.step, loss=loss, images_per_second=speed))
        self.training_seconds += seconds
        self._pending.clear()
        self._since = now

    def _event(self, step: int, **values: float) -> Event:
        per_epoch, total = self._trainer.steps_per_epoch, self._trainer.total_steps
        return Event(step=step, total_steps=total, epoch=(step - 1) // per_epoch + 1, **values)


def main() -> int:
    die_with_parent()
    folder = JobFolder(Path(sys.argv[1]))
    job = folder.read_job()
    try:
        train(job, folder, meeting=Path(sys.argv[2]))
    except Exception as error:
        if status := getattr(error, "exit_status", None):
            folder.write_outcome(Outcome(status="failed", error=str(error), exit_status=status))
            return 1
        folder.write_outcome(Outcome(status="crashed", error=f"{type(error).__name__}: {error}", exit_status=1))
        raise
    return 0


def train(job: Job, folder: JobFolder, meeting: Path) -> None:
    """Train to the end; rank 0 reports, and stores the weights and the outcome."""
    settings = Settings()
    store = ObjectStore.connect(settings.bucket, create=False)
    cache = Cache(settings.cache, store)
    manifest = load_manifest(store, job.dataset_version)
    train_split, val_split = (open_split(cache, manifest, split) for split in ("train", "val"))

    make_deterministic()
    with process_group(dist.FileStore(str(meeting), job.world_size)) as (device, exchange):
        trainer = Trainer(
            job.config, manifest=manifest, train=train_split, val=val_split, device=device, exchange=exchange
        )
        first = exchange.rank == 0
        with RankZero(job, folder, trainer) if first else contextlib.nullcontext(Silent()) as reporter:
            began = time.perf_counter()
            fit(trainer, reporter)
            seconds = time.perf_counter() - began
        if isinstance(reporter, RankZero):
            finish(job, folder, store, trainer, reporter, seconds)


def finish(
    job: Job, folder: JobFolder, store: ObjectStore, trainer: Trainer, reporter: RankZero, seconds: float
) -> None:
    """Commit the weights, then leave the outcome."""
    digest = save_weights(trainer.network, folder.weights)
    key = commit_weights(store, job, step=trainer.step, weights=folder.weights, weights_sha256=digest)
    assert reporter.last_epoch is not None
    folder.write_outcome(
        Outcome(
            status="finished",
            weights_key=key,
            weights_sha256=digest,
            steps=trainer.step,
            train_seconds=seconds,
            images_per_second=trainer.step * job.config.batch_size / reporter.training_seconds,
            val_accuracy=reporter.last_epoch.val.accuracy,
            val_loss=reporter.last_epoch.val.loss,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
