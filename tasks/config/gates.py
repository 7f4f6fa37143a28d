"""The conditions under which a version becomes champion (`serving.*`, `gate.*`). Importing this loads pydantic only."""

import math
from functools import partial
from statistics import NormalDist
from typing import Literal

from pydantic import Field

from cnn.config.base import Config
from infra.errors import UsageError
from tasks.config.key_values import from_settings

DEFAULT_MARGIN = 0.005
"""Margin of `non-inferior`, if the test split is large enough to rule out so small a loss."""


class GateConfig(Config):
    """Conditions of the quality gate. The weights depend on none of them."""

    floor: float | None = Field(None, ge=0, le=1)
    """Least accuracy: the lower end of its 95 % interval on the test split must reach it. Unset: the accuracy must be
    significantly higher than that of always answering the most frequent class. 0 switches the check off."""

    mode: Literal["superior", "non-inferior"] = "non-inferior"
    """Significantly better than the champion, or significantly not worse by more than the margin. `non-inferior` suits
    models that must stay fresh; only the floor notices several small losses in a row."""

    margin: float | None = Field(None, ge=0, lt=1)
    """Of accuracy. `superior`: the smallest gain (unset: 0). `non-inferior`: the largest loss (unset: 0.005, or 3
    divided by the number of test images if that is more, since the test split cannot show a smaller loss)."""

    alpha: float = Field(0.05, gt=0, lt=0.5)
    """Largest probability of passing wrongly, one-sided."""

    power: float = Field(0.8, gt=0.5, lt=1)
    """Least probability of passing rightly; below it, the verdict says that the test split is too small."""

    detectable: float = Field(0.01, gt=0, lt=1)
    """Gain in accuracy that is assumed of a superior version when the power is computed, if it exceeds the margin."""

    max_class_drop: float = Field(0.05, ge=0, le=1)
    """Largest loss of accuracy on any class or slice, against the champion; a significantly larger loss is refused. 1
    switches the check off."""

    min_support: int = Field(100, ge=1)
    """Least test images of a class or slice. With fewer, its drop is not tested, and its recall does not count as
    passed."""

    min_class_recall: float = Field(0.1, ge=0, lt=1)
    """Least recall of any class. A class fails if even the upper end of its recall's interval (confidence 1 − alpha) is
    lower: with the default, that takes 29 test images. Any other class with fewer than `min_support` images counts as
    not tested. 0 switches the check off."""

    max_size_bytes: int | None = Field(None, gt=0)
    """Largest size of the weights, in bytes. Unset: no limit."""

    max_latency_ms: float | None = Field(None, gt=0)
    """Largest median time per image on this machine's CPU, in milliseconds. Unset: no limit and no measurement."""

    def smallest_margin(self, images: int) -> float:
        """Returns the smallest loss that this number of test images can rule out, even without any disagreement.

        3 / images, the rule of three (Hanley and Lippman-Hand, JAMA 249, 1983); more for an alpha below 0.05.
        """
        return max(3.0, NormalDist().inv_cdf(self.alpha) ** 2, -math.log(self.alpha)) / images

    def margin_on(self, images: int) -> float:
        """Returns the margin for this number of test images."""
        if self.margin is not None:
            return self.margin
        return 0.0 if self.mode == "superior" else min(max(DEFAULT_MARGIN, self.smallest_margin(images)), 1.0)

    def can_pass(self, images: int) -> bool:
        """Returns whether this number of test images can show the margin."""
        margin = self.margin_on(images)
        return self.mode == "superior" or margin >= self.smallest_margin(images) * (1 - 1e-9)

    def images_for_margin(self) -> int:
        """Returns the least number of test images that can show the margin; 0 if the margin follows their number."""
        if self.mode == "superior" or not self.margin:
            return 0
        return math.ceil(self.smallest_margin(1) / self.margin * (1 - 1e-9))

    def check_floor(self, images: int) -> None:
        """Checks whether the floor can be reached on this number of test images, with all of them right.

        The lower end of Wilson's interval (1927) is then images / (images + z²), with z of 95 % confidence.

        Raises:
            UsageError: it cannot.
        """
        floor, z = self.floor or 0.0, NormalDist().inv_cdf(0.975)
        if images < floor * (images + z**2):
            needed = f"it needs {math.ceil(z**2 * floor / (1 - floor)):,}" if floor < 1 else "no number of images can"
            raise UsageError(
                f"gate.floor: {images:,} test images can never show an accuracy of {floor:.5g}, even if all are right: "
                f"{needed}; set it to at most {math.floor(1e4 * images / (images + z**2)) / 1e4:.4f}"
            )

    def why_never(self, images: int) -> str:
        """Returns an explanation of why `can_pass` is false."""
        text = (
            f"{images:,} test images can never show it: the smallest margin that they can show is "
            f"{self.smallest_margin(images):.2%}"
        )
        needed = self.images_for_margin()
        return text + (f", and gate.margin={self.margin:g} needs {needed:,} images" if needed else "")


class ServingConfig(Config):
    """How the serving gate tests a registered version (`serving.*`)."""

    http: bool = True
    """Test it over HTTP (the server of `mlflow models serve`), in addition to loading it in a fresh process."""

    tolerance: float | None = Field(None, gt=0, le=0.1)
    """Largest difference between a served and an evaluated probability. Unset: 1e-5, or 1e-3 if a GPU evaluated."""

    time_limit: float = Field(600.0, gt=0, le=86_400)
    """Most seconds to load the model, and per answer."""


def check_override(force: bool, reason: str) -> None:
    """Raises UsageError if the gates are to be overridden without a reason."""
    if force and not reason.strip():
        raise UsageError("--force needs a --reason, which is kept in the history")


load_gate = partial(from_settings, GateConfig, example="mode=non-inferior", section="gate.")
"""Returns the conditions that `key=value` texts set; keys may begin with `gate.`; raises UsageError."""
