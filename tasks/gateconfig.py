"""What a version has to show before it becomes champion (`serving.*`, `gate.*`); this module loads pydantic only."""

from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from cnn.config import Config
from tasks.keyvalues import from_settings

DEFAULT_MARGIN = {"superior": 0.0, "non-inferior": 0.005}


class GateConfig(Config):
    """Conditions of the quality gate. None of them is part of what the weights depend on."""

    floor: float | None = Field(None, ge=0, le=1)
    """Least accuracy on the test split. Unset: more than the share of its largest class, which a constant reaches."""

    mode: Literal["superior", "non-inferior"] = "non-inferior"
    """Better than the champion, or not worse by more than the margin, both beyond chance. A model that has to stay
    fresh need not get better each time; of several small losses in a row only the floor takes notice."""

    margin: float | None = Field(None, ge=0, lt=1)
    """In accuracy: the least gain if superior (unset: 0), the largest loss if non-inferior (unset: 0.005)."""

    alpha: float = Field(0.05, gt=0, lt=0.5)
    """Largest probability of a wrong yes, one-sided."""

    power: float = Field(0.8, gt=0.5, lt=1)
    """Probability of a rightful yes below which the verdict says that the test split is too small."""

    detectable: float = Field(0.01, gt=0, lt=1)
    """Gain in accuracy that a superior version is taken to have when the power is reckoned, if beyond the margin."""

    max_class_drop: float = Field(0.05, ge=0, le=1)
    """Largest loss of accuracy on any one class or slice, against the champion."""

    min_support: int = Field(100, ge=1)
    """Images that a class or slice needs for its drop to count: in fewer, chance alone would exceed it."""

    max_size_bytes: int | None = Field(None, gt=0)
    """Largest size of the weights, in bytes. Unset: any."""

    max_latency_ms: float | None = Field(None, gt=0)
    """Largest median time for one image on this machine's CPU, in milliseconds. Unset: any, and none is measured."""

    @property
    def effective_margin(self) -> float:
        """The margin, or the mode's own."""
        return DEFAULT_MARGIN[self.mode] if self.margin is None else self.margin


class ServingConfig(Config):
    """How a registered version is tried before it may be released (`serving.*`)."""

    http: bool = True
    """Serve it over HTTP too (`mlflow models serve`), besides loading it in a fresh process."""

    tolerance: float | None = Field(None, gt=0, le=0.1)
    """Largest difference of a probability from the evaluated one. Unset: 1e-5, or 1e-3 if a GPU evaluated."""

    time_limit: float = Field(600.0, gt=0, le=86_400)
    """Seconds to load the model, and for each answer."""


def load_gate(settings: Iterable[str]) -> GateConfig:
    """Conditions from `key=value` texts; a leading `gate.` may be there.

    Raises:
        UsageError: a key or value that cannot be used.
    """
    return from_settings(GateConfig, settings, example="mode=non-inferior", section="gate.")
