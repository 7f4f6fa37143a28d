"""Progress reports of a training. All ranks produce equal reports, including every rank's timings."""

from dataclasses import dataclass

from cnn.evaluation.evaluate import Score


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """Means over the `steps` steps that end with `step`, which counts from 1."""

    step: int
    steps: int
    loss: float
    accuracy: float
    """On augmented images."""

    gradient_norm: float
    """Before clipping."""

    learning_rate: float
    """Value in the last step, not a mean."""

    rank_seconds: tuple[float, ...]
    """Computing time per step and rank, without the time of waiting for other ranks; empty if not known yet."""

    data_seconds: float = 0.0
    """Waiting for images per step, the mean of the ranks; part of `rank_seconds`."""

    exchange_seconds: float = 0.0
    """Waiting for other ranks after the last gradient, likewise; not part of `rank_seconds`."""


@dataclass(frozen=True, kw_only=True)
class EpochReport:
    """The validation score after an epoch. `epoch` and `step` count from 1."""

    epoch: int
    step: int
    val: Score
