"""The configuration of a sweep: which values its trials take, and at which epochs they are compared."""

import math
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, ValidationError, model_validator

from cnn.config.base import Config
from cnn.config.training import TrainConfig
from infra.errors import UsageError
from tasks.config.key_values import explain, put
from tasks.config.run import RunConfig, load_config, read_file

Value = bool | int | float | str | None
Metric = Literal["val/accuracy", "val/loss"]

FIXED = {"epochs", "validate_every", "pretrained", "pretrained_sha256", "pretrained_mean", "pretrained_std"}
"""Keys that all trials share, since they are compared at the same epochs and start from the same weights."""


class Range(Config):
    """Numbers from `low` to `high`, both included; integers if both are."""

    low: int | float
    high: int | float

    log: bool = False
    """Whether each order of magnitude is as likely as another."""

    step: int | float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low={self.low} must be less than high={self.high}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("a range with log=true begins above 0, and has no step")
        return self

    @property
    def whole(self) -> bool:
        """Whether its values are integers."""
        return all(isinstance(each, int) for each in (self.low, self.high, self.step or 1))


class Rung(NamedTuple):
    """So many trials are trained from the end of one epoch to that of another; the best of them go on."""

    start: int
    epoch: int
    trials: int

    @property
    def epochs(self) -> int:
        """The epochs that each of its trials trains."""
        return self.epoch - self.start


class SweepConfig(Config):
    """A search among configurations that differ in some keys."""

    space: dict[str, Range | tuple[Value, ...]] = Field(min_length=1)
    """By key, such as `lr` or `augment.cutout`: a range, or a list of values."""

    trials: int = Field(27, ge=2, le=1000)
    eta: int = Field(3, ge=2, le=10)
    """Of the trials at a rung, one of so many goes on to the next, which is so many times as far."""

    metric: Metric = "val/accuracy"

    def rungs(self, epochs: int) -> list[Rung]:
        """Returns the rungs; the last is at the end of the training."""
        count = min(_whole_log(self.trials, self.eta), _whole_log(epochs, self.eta))
        ends = [max(1, round(epochs / self.eta ** (count - number))) for number in range(count + 1)]
        return [
            Rung(start, end, max(1, self.trials // self.eta**number))
            for number, (start, end) in enumerate(pairwise([0, *ends]))
        ]

    def cost(self, epochs: int) -> int:
        """Returns the epochs that all trials together train."""
        return sum(rung.trials * rung.epochs for rung in self.rungs(epochs))

    def corners(self) -> Iterator[tuple[str, Value]]:
        """Yields each key with each value of its list, or both ends of its range."""
        for key, values in self.space.items():
            for value in (values.low, values.high) if isinstance(values, Range) else values:
                yield key, value


class SweepRequest(Config):
    """A sweep to begin, or one to resume, and how many trials to run at a time."""

    sweep: SweepConfig | None = None
    resume: str | None = None
    """MLflow run of a sweep that has stopped."""

    at_once: int | None = Field(None, ge=1)


def _whole_log(number: int, base: int) -> int:
    return next(power for power in range(number.bit_length() + 1) if base ** (power + 1) > number)


def read_sweep(file: Path, options: Mapping[str, Any], config: RunConfig) -> SweepConfig:
    """Reads the space of a sweep, and checks all its values against the configuration.

    Args:
        file: YAML mapping of keys to ranges and lists.
        options: the other fields of the sweep; None values are ignored.
        config: what its keys do not set.

    Raises:
        UsageError: one line that names the wrong key.
    """
    space = read_file(file, "space")
    if not isinstance(space, dict) or not space:
        raise UsageError(f"{file} must hold keys with ranges or lists, for example 'lr: {{low: 0.05, high: 0.5}}'")
    parsed: dict[str, Range | list[Any]] = {}
    for key, values in space.items():
        if not isinstance(values, dict | list) or not values:
            raise UsageError(f"{file}: {key}: write a list of values, or a range such as {{low: 0.05, high: 0.5}}")
        if str(key).partition(".")[0] not in TrainConfig.model_fields.keys() - FIXED:
            raise UsageError(
                f"{file}: {key} is no key that trials can differ in; `convoy config` lists those of training"
            )
        if isinstance(values, list):
            parsed[key] = values
            continue
        try:
            parsed[key] = Range.model_validate(values)
        except ValidationError as error:
            raise UsageError(f"{file}: {key}: {explain(error, Range, values)}") from None
    given = {"space": parsed} | {key: value for key, value in options.items() if value is not None}
    try:
        sweep = SweepConfig.model_validate(given)
    except ValidationError as error:
        where = f"{file}: " if error.errors()[0]["loc"][0] == "space" else "--"
        raise UsageError(where + explain(error, SweepConfig, given)) from None
    for key, value in sweep.corners():
        if key == "batch_size" and not value:
            raise UsageError(f"{file}: batch_size: name sizes; 0, which leaves the choice to Convoy, is none")
        try:
            trial_config(config, {key: value})
        except UsageError as error:
            raise UsageError(f"{file}: {error}") from None
    if len(sweep.rungs(config.epochs)) < 2:
        raise UsageError(
            f"a sweep compares trials before their end: give it at least {sweep.eta} epochs and {sweep.eta} trials"
            + ", or a smaller --eta" * (sweep.eta > 2)
        )
    return sweep


def trial_config(config: RunConfig, values: Mapping[str, Value]) -> RunConfig:
    """Returns the configuration of a trial, with its values of some keys in dotted form.

    It is validated after each epoch, since trials are compared at the ends of rungs.

    Raises:
        UsageError: a value is invalid.
    """
    nested: dict[str, Any] = {"validate_every": 1}
    for key, value in values.items():
        put(nested, key, value, key)
    return load_config(None, (), nested, base=config.model_dump(exclude_unset=True))


def value_of(config: RunConfig, key: str) -> Any:
    """Returns the configuration's own value of a key in dotted form."""
    found: Any = config
    for name in key.split("."):
        found = found[name] if isinstance(found, Mapping) else getattr(found, name, None)
    return found


def contains(values: Range | tuple[Value, ...], value: Any) -> bool:
    """Returns whether a value is in a range or list."""
    if not isinstance(values, Range):
        return value in values
    if isinstance(value, bool) or not isinstance(value, int | float) or not values.low <= value <= values.high:
        return False
    if values.whole and not isinstance(value, int):
        return False
    return values.step is None or math.isclose(math.remainder(value - values.low, values.step), 0, abs_tol=1e-12)
