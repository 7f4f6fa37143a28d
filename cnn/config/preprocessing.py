"""Configuration of preprocessing."""

from typing import Literal

from pydantic import ByteSize, Field

from cnn.config.base import Config

Encoding = Literal["raw", "jpeg", "webp"]


class PreprocessConfig(Config):
    """Configuration of preprocessing, from source images to a dataset version (`data.*`)."""

    image_size: int | None = Field(None, ge=1, le=4096)
    """Height and width in pixels. Unset: that of the images if all are squares of one size, else the median shorter
    side, at most 128."""

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
