"""What a version has to show before it becomes champion (`serving.*`, `gate.*`); this module loads pydantic only."""

import math
from collections.abc import Iterable
from statistics import NormalDist
from typing import Literal

from pydantic import Field

from cnn.config.base import Config
from tasks.config.key_values import from_settings

DEFAULT_MARGIN = 0.005
"""Of `non-inferior`, where the test split is large enough to show so small a loss."""


class GateConfig(Config):
    """Conditions of the quality gate. None of them is part of what the weights depend on."""

    floor: float | None = Field(None, ge=0, le=1)
    """Least accuracy, by the lower end of its 95 % interval on the test split. Unset: more, beyond chance, than a
    constant answer of the most frequent class reaches."""

    mode: Literal["superior", "non-inferior"] = "non-inferior"
    """Better than the champion, or not worse by more than the margin, both beyond chance. A model that has to stay
    fresh need not get better each time; of several small losses in a row only the floor takes notice."""

    margin: float | None = Field(None, ge=0, lt=1)
    """In accuracy: the least gain if superior (unset: 0), the largest loss if non-inferior (unset: 0.005, or what the
    test split can show if that is more: 3 / its images)."""

    alpha: float = Field(0.05, gt=0, lt=0.5)
    """Largest probability of a wrong yes, one-sided."""

    power: float = Field(0.8, gt=0.5, lt=1)
    """Probability of a rightful yes below which the verdict says that the test split is too small."""

    detectable: float = Field(0.01, gt=0, lt=1)
    """Gain in accuracy that a superior version is taken to have when the power is reckoned, if beyond the margin."""

    max_class_drop: float = Field(0.05, ge=0, le=1)
    """Largest loss of accuracy on any one class or slice, against the champion; refused if shown, beyond chance, to be
    more."""

    min_support: int = Field(100, ge=1)
    """Images that a class or slice needs for its drop to count."""

    min_class_recall: float = Field(0.1, ge=0, lt=1)
    """Least recall of any class; a version is refused if a class is shown, beyond chance, to have less. With the
    default a class needs 29 test images to be tested at all. 0 switches the check off."""

    max_size_bytes: int | None = Field(None, gt=0)
    """Largest size of the weights, in bytes. Unset: any."""

    max_latency_ms: float | None = Field(None, gt=0)
    """Largest median time for one image on this machine's CPU, in milliseconds. Unset: any, and none is measured."""

    def smallest_margin(self, images: int) -> float:
        """Returns the smallest loss that a test split of so many images can rule out, even without any disagreement.

        3 / images, the rule of three (Hanley and Lippman-Hand, JAMA 249, 1983); more for an alpha below 0.05.
        """
        return max(3.0, NormalDist().inv_cdf(self.alpha) ** 2, -math.log(self.alpha)) / images

    def margin_on(self, images: int) -> float:
        """Returns the margin on a test split of so many images."""
        if self.margin is not None:
            return self.margin
        return 0.0 if self.mode == "superior" else min(max(DEFAULT_MARGIN, self.smallest_margin(images)), 1.0)

    def can_pass(self, images: int) -> bool:
        """Returns whether a test split of so many images can ever show what the margin asks for."""
        margin = self.margin_on(images)
        return self.mode == "superior" or margin >= self.smallest_margin(images) * (1 - 1e-9)

    def images_for_margin(self) -> int:
        """Returns the test images without which the margin can never be shown; 0 if the margin follows their number."""
        if self.mode == "superior" or not self.margin:
            return 0
        return math.ceil(self.smallest_margin(1) / self.margin * (1 - 1e-9))

    def why_never(self, images: int) -> str:
        """Returns an explanation for readers of why `can_pass` is false."""
        text = (
            f"{images:,} test images can never show it: the smallest margin that they can show is "
            f"{self.smallest_margin(images):.2%}"
        )
        needed = self.images_for_margin()
        return text + (f", and gate.margin={self.margin:g} needs {needed:,} images" if needed else "")


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
