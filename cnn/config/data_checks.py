"""What data must be like to be trained on."""

from typing import Literal

from pydantic import Field

from cnn.config.base import Config

Level = Literal["off", "warn", "fail"]


class DataGateConfig(Config):
    """What data must be like to be trained on (`data_gate.*`): for each check a level and a limit.

    `warn` puts a remark into the report, `fail` refuses the data, `off` does neither.
    """

    class_images: Level = "warn"
    min_class_images: int = Field(10, ge=0)
    """Training images that every class has at least."""

    imbalance: Level = "warn"
    max_imbalance: float = Field(10.0, ge=1)
    """Training images of the largest class for each one of the smallest."""

    duplicates: Level = "warn"
    max_duplicates: float = Field(0.02, ge=0, le=1)
    """Share of a split's images that equal an earlier one of the split, pixel for pixel."""

    conflicts: Level = "warn"
    max_conflicts: float = Field(0.001, ge=0, le=1)
    """Share of all images that equal one with another label."""

    leakage: Level = "fail"
    max_leakage: float = Field(0.01, ge=0, le=1)
    """Share of the validation images that are training images too, or of the test images that are either."""

    trained_on: Level = "warn"
    max_trained_on: float = Field(0.01, ge=0, le=1)
    """Share of the test images that are in the champion's training split and not in this version's, since the split,
    the fractions or the seed changed. Above it, `warm_start` is refused, unless the check is off."""

    test_images: Level = "warn"
    min_test_images: int = Field(100, ge=0)
    """Test images: N of them can show no loss below 3 / N. A `gate.margin` of your own may need more."""

    unreadable: Level = "warn"
    max_unreadable: float = Field(0.0, ge=0, le=1)
    """Share of the source's images that could not be decoded (`data.max_unreadable` stops preprocessing)."""

    left_out: Level = "warn"
    max_left_out: float = Field(0.5, ge=0, le=1)
    """Share of a class folder's files that were left out: not named like images, or broken links."""

    constant: Level = "fail"
    max_constant: float = Field(0.01, ge=0, le=1)
    """Share of images of one colour."""

    blank: Level = "warn"
    max_blank: float = Field(0.01, ge=0, le=1)
    """Share of images, the constant ones apart, whose contrast is at most `blank_contrast`."""

    blank_contrast: int = Field(8, ge=1, le=255)
    """Grey levels between the darkest and the brightest pixel of a channel."""

    size_ratio: Level = "warn"
    max_size_ratio: float = Field(4.0, ge=1)
    """Largest width or height in the source for one pixel of the smallest."""

    other_modes: Level = "warn"
    max_other_modes: float = Field(0.1, ge=0, le=1)
    """Share of the source's images that have not the commonest mode (grey, RGB, palette, ...)."""

    missing_classes: Level = "fail"
    max_missing_classes: int = Field(0, ge=0)
    """Classes that the champion knows and the data lack."""

    new_classes: Level = "warn"
    max_new_classes: int = Field(0, ge=0)
    """Classes that the champion does not know."""

    class_drift: Level = "warn"
    max_class_drift: float = Field(0.25, ge=0)
    """PSI between the classes' shares of the champion's training split and of this one."""

    pixel_drift: Level = "warn"
    max_pixel_drift: float = Field(0.25, ge=0)
    """Likewise for pixel values, in 16 bins; the largest PSI of a channel."""

    slow_class_drift: Level = "warn"
    max_slow_class_drift: float = Field(0.25, ge=0)
    """`class_drift` against the data of the oldest champion that a rollback can reach: many small drifts add up."""

    slow_pixel_drift: Level = "warn"
    max_slow_pixel_drift: float = Field(0.25, ge=0)
    """Likewise for pixel values."""
