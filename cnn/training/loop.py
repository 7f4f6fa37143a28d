"""The training loop: runs steps and validations, passes on reports, and offers to store checkpoints."""

from typing import Protocol

from cnn.training.reports import EpochReport, StepReport
from cnn.training.trainer import Trainer

REPORT_DELAY_STEPS = 2  # figures are read so many steps after their computation, so that nothing waits for a GPU


class Reporter(Protocol):
    """Receives the reports of a training."""

    def on_step(self, report: StepReport) -> None: ...

    def on_epoch(self, report: EpochReport) -> None: ...

    def after_step(self, trainer: Trainer, *, milestone: bool) -> None:
        """May store the trainer's state; a `milestone` is the end of an epoch, or the last step before a stop.

        The figures of the newest steps are still on their way: `list(trainer.reports.until(trainer.step))` waits for
        them, before `take_state(trainer)`.
        """


def fit(trainer: Trainer, reporter: Reporter, *, until_epoch: int | None = None) -> bool:
    """Trains to the last step, or to the step at which the ranks agree to stop; returns whether training is finished.

    Args:
        until_epoch: train to the end of this epoch only; the same training can go on from its state then.

    Raises:
        NonFinite: a loss or gradient was infinite or not a number.
    """
    end = trainer.total_steps if until_epoch is None else until_epoch * trainer.steps_per_epoch
    while not trainer.finished and trainer.step < end:
        trainer.train_step()
        epoch_ends = trainer.step % trainer.steps_per_epoch == 0
        settled = trainer.step if epoch_ends else trainer.step - REPORT_DELAY_STEPS
        for report in trainer.reports.until(settled):
            reporter.on_step(report)
        if trainer.reports.broken_step <= settled:
            raise trainer.non_finite_error()
        if trainer.validates:
            epoch = trainer.step // trainer.steps_per_epoch
            reporter.on_epoch(EpochReport(epoch=epoch, step=trainer.step, val=trainer.validate()))
        stopping = trainer.reports.vote_step <= settled
        reporter.after_step(trainer, milestone=epoch_ends or stopping)
        if stopping:
            return trainer.finished
    return trainer.finished
