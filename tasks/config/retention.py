"""How long objects and files are kept (`convoy prune`). Importing this loads pydantic only."""

from functools import partial

from pydantic import Field

from cnn.config.base import Config
from tasks.config.key_values import from_settings


class RetentionConfig(Config):
    """Ages in days, counted from when an object was written (`convoy prune --set`, `deploy.retention.*`).

    Always kept: all verdicts and promotions, and everything that is used by a champion, an earlier champion that a
    rollback can restore, a version with an alias, or a running training.
    """

    grace_days: float = Field(1.0, ge=0)
    """Nothing younger than this is removed: a running step may have just stored it."""

    finished_checkpoints_days: float = Field(0.0, ge=0)
    """Checkpoints of finished trainings, which nothing needs."""

    unfinished_checkpoints_days: float = Field(14.0, ge=0)
    """Checkpoints of trainings that failed or were interrupted, and their data; until then they can be resumed."""

    runs_days: float = Field(90.0, ge=0)
    """Weights and records of trainings without a registered version."""

    datasets_keep: int = Field(5, ge=0)
    """Number of newest dataset versions that are kept, whatever their age."""

    datasets_days: float = Field(30.0, ge=0)
    """Dataset versions beyond those."""

    steps_days: float = Field(365.0, ge=0)
    """Records of the dataset version that a preprocessing made; without its record, a preprocessing is repeated."""

    journals_days: float = Field(7.0, ge=0)
    """Journals of interrupted preprocessings, counted from the last entry; until then a preprocessing can go on."""

    raw_days: float = Field(30.0, ge=0)
    """Raw data, and weights to start from, that no kept training uses."""

    reports_days: float = Field(90.0, ge=0)
    """Reports of the data gate."""

    cache_days: float = Field(30.0, ge=0)
    """Files on this machine, counted from the last read: the cache, and the folders of ended trainings."""


load_retention = partial(from_settings, RetentionConfig, example="datasets_keep=3")
"""Returns the defaults, changed by `key=value` texts; raises UsageError."""
