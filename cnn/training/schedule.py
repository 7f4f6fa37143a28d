"""Computes the learning rate as a pure function of the step, so that a checkpoint needs only the step."""

import math

from cnn.config.training import TrainConfig


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Returns the learning rate of a step of 0 … total_steps - 1.

    `one-cycle` is the triangle of Smith, "Super-convergence" (2018): linear up over the warm-up, linear down to zero.
    `cosine` is the half cosine of Loshchilov and Hutter, "SGDR" (2017), after a linear warm-up.
    """
    warmup_steps = round(config.warmup * total_steps)
    if config.schedule == "constant":
        return config.lr
    if step < warmup_steps:
        return config.lr * (step + 1) / (warmup_steps + 1)
    remaining = (total_steps - step) / (total_steps - warmup_steps + 1)
    if config.schedule == "cosine":
        return config.lr * (1 - math.cos(math.pi * remaining)) / 2
    return config.lr * remaining


def average_decay(config: TrainConfig, step: int) -> float:
    """Returns the decay of the weights' moving average at a step of 0 …; smaller at first, when weights change fast."""
    return min(config.ema, (1 + step) / (10 + step))
