"""How source images become a dataset version."""

from typing import Literal

from pydantic import ByteSize, Field

from cnn.config.base import Config

Encoding = Literal["raw", "jpeg", "webp"]


class PreprocessConfig(Config):
    """How source images become a dataset version (`data.*`)."""

    image_size: int | None = Field(None, ge=1, le=4096)
    """Height and width in pixels. Unset: the size that all images share, else the median shorter side, at most 128."""

    channels: Literal[1, 3] | None = None
    """1 for grey, 3 for RGB. Unset: 1 if every image is grey, else 3."""

    val_fraction: float = Field(0.1, gt=0, lt=0.5)
    """Share of the training images held out for validation, where the source brings no validation split."""

    test_fraction: float = Field(0.15, gt=0, lt=0.5)
    """Share of all images held out for the test, where the source brings no test split."""

    split_seed: int = Field(0, ge=0, lt=2**32)
    """Chooses another random split; an image's split depends on this and on its own content only."""

    max_unreadable: float = Field(0.01, ge=0, le=1)
    """Share of images that may be unreadable (named and left out) before preprocessing fails."""

    limit: int | None = Field(None, ge=1)
    """For a trial run: keep at most this many images of each split, spread evenly over the source."""

    encoding: Encoding = "raw"
    """How packed images are stored: as pixels, which are read fastest, or compressed with losses. webp: colour only."""

    quality: int = Field(90, ge=1, le=100)
    """Of jpeg and webp; higher is larger and truer."""

    shard_bytes: ByteSize | None = Field(None, ge=1)
    """Size of a full shard, such as 8MiB. Unset: 64MiB; 8MiB if the pixels of all images take more than 64GiB."""

    keep_raw: bool | None = None
    """Copy the source's files into the bucket; no: a folder is read where it lies, twice.
    Unset: yes, but for a folder of more than 50 000 files or 16 GiB."""
