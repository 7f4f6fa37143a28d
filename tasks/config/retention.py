"""How long what accumulates is kept (`convoy prune`); this module loads pydantic only."""

from collections.abc import Iterable

from pydantic import Field

from cnn.config.base import Config
from tasks.config.key_values import from_settings


class RetentionConfig(Config):
    """Ages are in days, by when a thing was written.

    Whatever these say, nothing goes that a champion, an earlier champion that a rollback can bring back, a version
    with an alias or a running training rests on; nor any verdict or promotion.
    """

    grace_days: float = Field(1.0, ge=0)
    """Nothing younger than this is ever removed: a running step may have just stored it."""

    finished_checkpoints_days: float = Field(0.0, ge=0)
    """Checkpoints of finished trainings, which nothing needs."""

    unfinished_checkpoints_days: float = Field(14.0, ge=0)
    """Checkpoints of trainings that failed or were interrupted: so long they can be resumed. Their data stays too."""

    runs_days: float = Field(90.0, ge=0)
    """Weights and records of trainings that no registered version came of."""

    datasets_keep: int = Field(5, ge=0)
    """Newest dataset versions that are kept, whatever their age."""

    datasets_days: float = Field(30.0, ge=0)
    """Dataset versions beyond those."""

    steps_days: float = Field(365.0, ge=0)
    """Records of which dataset version a preprocessing gave; without one, it is done anew."""

    journals_days: float = Field(7.0, ge=0)
    """What an interrupted preprocessing has packed: so long it goes on where it was, since it last came further."""

    raw_days: float = Field(30.0, ge=0)
    """Raw data, and weights to start from, that no kept training was made of."""

    reports_days: float = Field(90.0, ge=0)
    """Reports of the data gate."""

    cache_days: float = Field(30.0, ge=0)
    """Files on this machine, since they were last read: the cache, and the folders of ended trainings."""


def load_retention(settings: Iterable[str]) -> RetentionConfig:
    """The defaults, changed by `key=value` texts.

    Raises:
        UsageError: a key or value that cannot be used.
    """
    return from_settings(RetentionConfig, settings, example="datasets_keep=3")
