"""The training loop: steps, reports, validations, and moments to store a checkpoint."""

from typing import Protocol

from cnn.training.reports import EpochReport, StepReport
from cnn.training.trainer import Trainer

STEPS_LATE = 2  # figures are acted on this many steps after they were computed, so that nothing waits for a GPU


class Reporter(Protocol):
    """Is told how a training goes."""

    def on_step(self, report: StepReport) -> None: ...

    def on_epoch(self, report: EpochReport) -> None: ...

    def after_step(self, trainer: Trainer, *, milestone: bool) -> None:
        """Hears of a good moment to take the state; a `milestone` is an epoch's end, or the last step before a stop."""
        ...


def fit(trainer: Trainer, reporter: Reporter) -> bool:
    """Trains to the last step, or to the step at which the ranks agree to stop; returns whether it is finished.

    Raises:
        NonFinite: a loss or gradient was infinite or not a number.
    """
    while not trainer.finished:
        trainer.train_step()
        epoch_ends = trainer.step % trainer.steps_per_epoch == 0
        settled = trainer.step if epoch_ends else trainer.step - STEPS_LATE
        for report in trainer.reports.until(settled):
            reporter.on_step(report)
        if trainer.reports.broken_step <= settled:
            raise trainer.blame()
        if epoch_ends:
            epoch = trainer.step // trainer.steps_per_epoch
            reporter.on_epoch(EpochReport(epoch=epoch, step=trainer.step, val=trainer.validate()))
        stopping = trainer.reports.vote_step <= settled
        reporter.after_step(trainer, milestone=epoch_ends or stopping)
        if stopping:
            return trainer.finished
    return True
