"""Conditions that data must meet before they are trained on."""

from typing import Literal

from pydantic import Field

from cnn.config.base import Config

Level = Literal["off", "warn", "fail"]


class DataGateConfig(Config):
    """Conditions that data must meet before they are trained on (`data_gate.*`): a level and a limit per check.

    `warn` adds a warning to the report, `fail` refuses the data, `off` does neither.
    """

    class_images: Level = "warn"
    """Check for classes with few training images."""

    min_class_images: int = Field(10, ge=0)
    """Smallest number of training images per class."""

    imbalance: Level = "warn"
    """Check for classes of very different sizes in the training split."""

    max_imbalance: float = Field(10.0, ge=1)
    """Training images of the largest class per training image of the smallest."""

    duplicates: Level = "warn"
    """Check for equal images within a split."""

    max_duplicates: float = Field(0.02, ge=0, le=1)
    """Share of a split's images that equal an earlier image of the split, pixel for pixel."""

    conflicts: Level = "warn"
    """Check for equal images with different labels."""

    max_conflicts: float = Field(0.001, ge=0, le=1)
    """Share of all images that equal an image with another label."""

    leakage: Level = "fail"
    """Check for equal images in different splits."""

    max_leakage: float = Field(0.01, ge=0, le=1)
    """Share of the validation images in the training split, or of the test images in the training or validation split;
    the larger one."""

    group_leakage: Level = "fail"
    """Check for groups, such as patients, whose images are in different splits."""

    max_group_leakage: float = Field(0.0, ge=0, le=1)
    """Share of the validation images whose group is in the training split, or of the test images whose group is in the
    training or validation split; the larger one. Above 0 only if the source brings its own splits."""

    trained_on: Level = "warn"
    """Check for test images that the champion was trained on."""

    max_trained_on: float = Field(0.01, ge=0, le=1)
    """Share of the test images that the champion was trained on but this version is not, because the splits, the
    fractions or the seed have changed. Above it `warm_start` is refused, unless the check is off."""

    test_images: Level = "warn"
    """Check for a test split that is too small to judge a version."""

    min_test_images: int = Field(100, ge=0)
    """Smallest number of test images. N images cannot rule out a loss below 3 / N: a small `gate.margin` needs more."""

    unreadable: Level = "warn"
    """Check for images that cannot be decoded."""

    max_unreadable: float = Field(0.0, ge=0, le=1)
    """Share of the source's images that could not be decoded (`data.max_unreadable` stops preprocessing)."""

    left_out: Level = "warn"
    """Check for class folders of which many files are left out."""

    max_left_out: float = Field(0.5, ge=0, le=1)
    """Share of a class folder's files that were left out: not named like images, or broken links."""

    constant: Level = "fail"
    """Check for images with a single colour."""

    max_constant: float = Field(0.01, ge=0, le=1)
    """Share of images with a single colour."""

    blank: Level = "warn"
    """Check for images with almost no contrast."""

    max_blank: float = Field(0.01, ge=0, le=1)
    """Share of images whose contrast is at most `blank_contrast`, without the constant images."""

    blank_contrast: int = Field(8, ge=1, le=255)
    """Grey levels between the darkest and the brightest pixel, in the channel where they differ most."""

    size_ratio: Level = "warn"
    """Check for images of very different sizes."""

    max_size_ratio: float = Field(4.0, ge=1)
    """Largest width divided by smallest width in the source; likewise for heights."""

    other_modes: Level = "warn"
    """Check for images in different modes."""

    max_other_modes: float = Field(0.1, ge=0, le=1)
    """Share of the source's images in another mode than the most common one (grey, RGB, palette, ...)."""

    missing_classes: Level = "fail"
    """Check for classes that the champion knows and the data lack."""

    max_missing_classes: int = Field(0, ge=0)
    """Number of classes that the champion knows and that are missing in the data."""

    new_classes: Level = "warn"
    """Check for classes that the champion does not know."""

    max_new_classes: int = Field(0, ge=0)
    """Number of classes that the champion does not know."""

    class_drift: Level = "warn"
    """Check for other shares of the classes than in the champion's data."""

    max_class_drift: float = Field(0.25, ge=0)
    """PSI between the class shares of the champion's training split and of this version's."""

    pixel_drift: Level = "warn"
    """Check for other pixel values than in the champion's data."""

    max_pixel_drift: float = Field(0.25, ge=0)
    """PSI between the pixel values of the same splits, in 16 bins; the largest PSI of all channels."""

    slow_class_drift: Level = "warn"
    """Check for other shares of the classes than in the data of an earlier champion."""

    max_slow_class_drift: float = Field(0.25, ge=0)
    """`class_drift` from the data of the oldest champion that a rollback can reach: many small drifts add up."""

    slow_pixel_drift: Level = "warn"
    """Check for other pixel values than in the data of an earlier champion."""

    max_slow_pixel_drift: float = Field(0.25, ge=0)
    """`pixel_drift` from the same data."""
