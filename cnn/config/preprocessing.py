"""Configuration of preprocessing."""

from typing import Literal

from pydantic import ByteSize, Field

from cnn.config.base import Config

Encoding = Literal["raw", "jpeg", "webp"]

Resize = Literal["crop", "pad", "squash"]

MAX_DEFAULT_SIZE, MAX_PRETRAINED_SIZE = 128, 224
"""Limits in pixels of an unset image size, unless all images are squares of one size: of a network that starts from
random weights, and from pretrained ones, which have mostly learned from 224 pixels."""


class ColumnsConfig(Config):
    """Names of a label table's columns (`data.columns.*`)."""

    path: str = "path"
    """Column of the images' paths: relative to the table, absolute, or s3:// addresses."""

    label: str = "label"
    """Column of the class names."""

    split: str = "split"
    """Column that puts an image into the train, val or test split; it may be missing, or empty in a row."""

    group: str = "group"
    """Column of the group; it may be missing. See `data.group`."""


class PreprocessConfig(Config):
    """Configuration of preprocessing, from source images to a dataset version (`data.*`)."""

    image_size: int | None = Field(None, ge=1, le=4096)
    """Height and width in pixels. Unset: that of the images if all are squares of one size, else the median shorter
    side, at most 128, or 224 with `pretrained`."""

    resize: Resize = "crop"
    """How rectangles become squares, here and in prediction: `crop` cuts out the centre, `pad` puts the whole image on
    a square of its mean colour, `squash` scales both sides."""

    channels: Literal[1, 3] | None = None
    """1 for grey, 3 for RGB. Unset: 1 if every image is grey, else 3."""

    val_fraction: float = Field(0.1, gt=0, lt=0.5)
    """Share of the training images held out for validation, if the source has no validation split."""

    test_fraction: float = Field(0.15, gt=0, lt=0.5)
    """Share of all images held out for the test, if the source has no test split."""

    split_seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the random split; an image's split depends on this seed and on its own content only."""

    max_unreadable: float = Field(0.01, ge=0, le=1)
    """Largest share of unreadable images, which are named and left out; above it preprocessing fails."""

    columns: ColumnsConfig = ColumnsConfig()

    group: str | None = None
    """Column of a label table whose images stay together, as those of one patient must: an image's split depends on
    the seed and on its group only. Unset: the column that `data.columns.group` names, if the table has it."""

    slices: tuple[str, ...] = ()
    """Columns of a label table whose values get an accuracy each in the report, and a check in the quality gate, such
    as [camera, site]."""

    limit: int | None = Field(None, ge=1)
    """Largest number of images per split, for a trial run: chosen at random, with the classes in turn."""

    encoding: Encoding = "raw"
    """Storage of packed images: `raw` pixels, which are read fastest, or lossy compression; webp for colour only."""

    quality: int = Field(90, ge=1, le=100)
    """Quality of jpeg and webp; a higher one gives larger files with smaller losses."""

    shard_bytes: ByteSize | None = Field(None, ge=1)
    """Size of a full shard, such as 8MiB. Unset: 64MiB; 8MiB if the pixels of all images take more than 64GiB."""

    keep_raw: bool | None = None
    """Whether the source's files are copied into the bucket; if not, a folder is read twice, in place. Unset: yes,
    unless the folder has more than 50 000 files or 16 GiB."""
