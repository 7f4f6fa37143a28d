"""The keys of a project's file, `convoy.yaml`: those of a training, and the deployment. Imports pydantic only.

The command line imports it only when it reads a configuration, so that `convoy --help` stays fast.
"""

import re
from functools import partial

from pydantic import Field, field_validator, model_validator

from cnn.config.base import Config
from infra.machine.checkouts import check_address
from tasks.config.retention import RetentionConfig
from tasks.config.run import RunConfig, load_as

CRON_FIELDS = (
    ("minute", 0, 59, ""),
    ("hour", 0, 23, ""),
    ("day", 1, 31, ""),
    ("month", 1, 12, "|jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec"),
    ("weekday", 0, 7, "|sun|mon|tue|wed|thu|fri|sat"),
)
"""Names, lowest and highest numbers, and what may stand in place of a number."""


class ScheduleConfig(Config):
    """When to retrain (`deploy.schedule.*`)."""

    cron: str | None = None
    """Minute, hour, day, month and weekday, as in cron: `0 3 * * *` is every night at three. Unset: at no time."""

    timezone: str = "UTC"
    """Time zone of these times, for example `Europe/Berlin`."""

    @field_validator("cron")
    @classmethod
    def _is_cron(cls, cron: str | None) -> str | None:
        fields = [] if cron is None else cron.split()
        if cron is not None and len(fields) != len(CRON_FIELDS):
            names = ", ".join(name for name, *_ in CRON_FIELDS)
            raise ValueError(f"{cron!r} does not have the five fields {names}; for example '0 3 * * *'")
        for field, (name, low, high, names) in zip(fields, CRON_FIELDS, strict=False):
            value = rf"(\d+{names})"
            lists = [rf"(\*|{value}(-{value})?)(/0*[1-9]\d*)?"]
            if name == "day":
                lists = [f"({lists[0]}|l)"]  # the last one of the month
            if name == "weekday":
                lists += [rf"{value}#[1-5]", r"l\d"]  # the second Friday, the last one; neither beside other kinds
            if not any(re.fullmatch(f"{each}(,{each})*", field, re.ASCII | re.IGNORECASE) for each in lists):
                raise ValueError(
                    f"{cron!r}: the {name} {field!r} is none of cron's; for example '*/15 3 * jan mon-fri'"
                )
            numbers = map(int, re.findall(r"(?<![/\d])\d+", field))  # those after a slash are steps
            if not all(low <= number <= high for number in numbers):
                raise ValueError(f"{cron!r}: the {name} {field!r} is not between {low} and {high}")
        return cron

    @field_validator("timezone")
    @classmethod
    def _is_known(cls, timezone: str) -> str:
        import difflib
        import zoneinfo

        known = zoneinfo.available_timezones()
        if timezone not in known:
            near = difflib.get_close_matches(timezone, known, n=1, cutoff=0)
            raise ValueError(f"unknown time zone {timezone!r}; did you mean {near[0]!r}?")
        return timezone


class PruneConfig(ScheduleConfig):
    """When `prune/storage`, a second deployment, removes what is older than `deploy.retention` (`deploy.prune.*`)."""


class NotificationConfig(Config):
    """Messages to a chat about the outcome of trainings, as `convoy notify` sets them up for all deployments of a
    Prefect (`deploy.notification.*`). The webhook's address is a secret, so the file only says where it is."""

    variable: str | None = None
    """Environment variable that holds the address where `convoy deploy` is called, for example `CONVOY_NOTIFY_URL`."""

    block: str | None = None
    """Or the name of a block of type Webhook in Prefect that holds it."""

    stale_after: float = Field(7.0, gt=0)
    """Days without a completed retraining after which a message is sent."""

    everything: bool = False
    """Send messages also about trial runs, mistakes, interrupted runs, and versions that are not to be promoted."""

    @model_validator(mode="after")
    def _has_one_address(self) -> "NotificationConfig":
        if self.variable and self.block:
            raise ValueError("variable and block exclude each other")
        return self

    @field_validator("variable", "block")
    @classmethod
    def _is_a_name(cls, name: str | None) -> str | None:
        """Refuses an address without repeating it, since it is a secret."""
        if name is not None and not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ValueError("it must be a name; the webhook's address is a secret, which does not belong in a file")
        return name


class CodeConfig(Config):
    """The code that workers train with (`deploy.code.*`): a commit of a git repository, and its lock file's packages.

    The lock file is `uv.lock`, `requirements.lock` or `requirements.txt`, and names Convoy (`convoy-cnn`), unless the
    repository is Convoy's own."""

    repository: str | None = None
    """Address or folder, as workers reach it; credentials come from the worker's git. Unset: the worker's folder."""

    ref: str | None = None
    """Branch, tag or commit; a branch means its newest commit at each run. Unset: the code installed on the worker."""

    @field_validator("repository")
    @classmethod
    def _holds_no_password(cls, repository: str | None) -> str | None:
        return None if repository is None else check_address(repository)


class DeployConfig(Config):
    """The deployment that `convoy deploy` makes of the project: `retrain/NAME`, named after the model (`deploy.*`)."""

    pool: str = Field("convoy", min_length=1)
    """Work pool whose workers run it (`convoy worker --pool`), in their working folder."""

    code: CodeConfig = CodeConfig()

    trial_pool: str | None = Field(None, min_length=1)
    """Work pool of `trial/NAME-trial`, in which `convoy trial` runs the code of commits that are not merged yet;
    `judge/NAME-judge` in the pool above judges them. Its workers need no right to write below `models/`, or to other
    MLflow experiments. Unset: there are no trials."""

    new_data: bool = True
    """Retrain when `convoy notify-data NAME` announces new images; NAME is that of the model."""

    older_names: tuple[str, ...] = ()
    """Earlier names of the deployment, whose schedules and triggers are switched off."""

    schedule: ScheduleConfig = ScheduleConfig()

    prune: PruneConfig = PruneConfig()

    retention: RetentionConfig = RetentionConfig()

    notification: NotificationConfig = NotificationConfig()

    @property
    def prunes(self) -> bool:
        """Whether the deployment `prune/storage` is made, too: the file says when to prune, or what to keep."""
        return bool({"prune", "retention"} & self.model_fields_set)


class ProjectConfig(RunConfig):
    """All keys of a file for `--config`, such as a project's `convoy.yaml`: those of a training, the recipe that they
    build on, and the deployment of the project."""

    recipe: str | None = None
    """Named configuration that the other keys build on; `--recipe` replaces it."""

    deploy: DeployConfig = DeployConfig()

    @property
    def run(self) -> RunConfig:
        """The configuration of a training: the keys that were set, without those of the project."""
        fields = self.model_fields_set & RunConfig.model_fields.keys()
        return RunConfig.model_validate({key: getattr(self, key) for key in fields})


load_project = partial(load_as, ProjectConfig)
"""Reads a project's file, or another for `--config`."""
