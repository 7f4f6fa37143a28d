"""What a training says of itself; equal on every rank, the ranks' own times included."""

from dataclasses import dataclass

from cnn.evaluation.evaluate import Score


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """Means over the `steps` steps that end with `step`, which counts from 1."""

    step: int
    steps: int
    loss: float
    accuracy: float
    """Of the augmented images."""

    gradient_norm: float
    """Before clipping."""

    learning_rate: float
    """Of the last step."""

    rank_seconds: tuple[float, ...]
    """Seconds a step that each rank computed, without the time it waited for others; empty if not known yet."""


@dataclass(frozen=True, kw_only=True)
class EpochReport:
    """What the validation split says after an epoch. `epoch` and `step` count from 1."""

    epoch: int
    step: int
    val: Score
