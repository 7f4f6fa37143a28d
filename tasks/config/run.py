"""The configuration of a whole run: what to train on, how, and under which name; from a file, `--set` and options.

Importing this module loads pydantic only, so that a mistake is refused before torch, Prefect or MLflow are loaded.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, field_validator, model_validator

from cnn.config.base import Config
from cnn.config.data_checks import DataGateConfig
from cnn.config.networks import NETWORKS
from cnn.config.preprocessing import PreprocessConfig
from cnn.config.training import TrainConfig
from cnn.distributed.world_size import check_world_size
from infra.errors import UsageError
from infra.sources.entries import CATALOGUE
from infra.tracking.names import model_name_fault
from tasks.config.gates import GateConfig, ServingConfig
from tasks.config.key_values import explain, read_settings
from tasks.config.launchers import KubernetesConfig, Launcher, NodesConfig, RayConfig
from tasks.config.plain_yaml import read_yaml

STEPS_AN_EPOCH = 20  # at least, where the batch size is ours to choose
LONGEST = 100_000  # characters of a configuration as JSON: it is a parameter of flow runs, and tags of MLflow's runs
RECIPES = Path(__file__).parent / "recipes"


class CheckpointConfig(Config):
    """When the state of a training is stored; no part of the result (`checkpoints.*`)."""

    every: float = Field(30.0, ge=0)
    """Seconds between checkpoints; there is one at each epoch's end too."""

    keep: int = Field(2, ge=1)
    """Newest checkpoints to keep; the one with the best validation accuracy stays too."""

    patience: float = Field(1800.0, gt=0)
    """Seconds to go on training while no checkpoint can be stored."""


class RunConfig(TrainConfig):
    """Everything that `convoy train` can be told. `TrainConfig`, `data` and the dataset decide the weights."""

    dataset: str = "fashion-mnist"
    """A catalogue name, a folder or archive of class sub-folders, or an s3:// or https:// address of one."""

    name: str | None = None
    """Name of the registered model. Unset: the dataset's name."""

    batch_size: int = Field(0, ge=0)
    """Images in a global batch, over all ranks; a multiple of `lanes`. 0: 256, fewer for a small training split."""

    ranks: int | None = Field(None, ge=1, le=4096)
    """Processes to train with; no part of the result. Unset: as many as share the lanes and have a GPU or core each."""

    launcher: Launcher = "local"
    """Where the ranks run; no part of the result. `local`: on this machine. `nodes`: on it and on each that has
    called `convoy join`. `ray`: in actors of a Ray cluster. `kubernetes`: in the pods of a Job."""

    nodes: NodesConfig = NodesConfig()

    ray: RayConfig = RayConfig()

    kubernetes: KubernetesConfig = KubernetesConfig()

    data: PreprocessConfig = PreprocessConfig()

    checkpoints: CheckpointConfig = CheckpointConfig()

    restarts: int = Field(3, ge=0)
    """How often in a row a training whose ranks died is taken up again without having come further."""

    data_gate: DataGateConfig = DataGateConfig()

    serving: ServingConfig = ServingConfig()

    gate: GateConfig = GateConfig()

    promote: bool | None = None
    """Make a version that passes its gates the champion. Unset: yes, but for a trial run (`data.limit`)."""

    approval: bool = False
    """Before that, pause the flow run until a person approves it in Prefect."""

    warm_start: bool = False
    """Retrain from the champion's weights rather than from fresh ones (`convoy retrain`)."""

    approval_patience: float = Field(86_400.0, gt=0)
    """Seconds to wait for that person."""

    @model_validator(mode="before")
    @classmethod
    def _no_mirror_images_of_digits(cls, values: Any) -> Any:
        """Where a data set's images have a left and a right, `augment.flip` is off unless asked for."""
        if not isinstance(values, dict):
            return values
        handed = any(entry.handed for entry in CATALOGUE if entry.name == values.get("dataset"))
        augment = values.get("augment") or {}
        if handed and isinstance(augment, dict):
            values = {**values, "augment": {"flip": False, **augment}}
        return values

    @field_validator("dataset")
    @classmethod
    def _holds_no_secret(cls, dataset: str) -> str:
        """Parameters are shown in Prefect and MLflow, so an address that gives access may not be one."""
        scheme, separator, rest = dataset.partition("://")
        if separator:
            dataset = f"{scheme.lower()}://{rest}"
        if not dataset.strip():
            raise ValueError("it is empty; name a data set, a folder (`.` for this one), an archive or an address")
        address = urlsplit(dataset)
        _ = address.port  # raises ValueError if it is no number
        if address.scheme in ("http", "https") and (address.query or "@" in address.netloc):
            raise ValueError(
                "an address with a password or a query would be stored with the run, for all to see; "
                "download it and give the file"
            )
        return dataset

    @field_validator("name")
    @classmethod
    def _registry_takes_it(cls, name: str | None) -> str | None:
        if name is not None and (fault := model_name_fault(name)):
            raise ValueError(f"{name!r} cannot name a model: {fault}")
        return name

    @model_validator(mode="after")
    def _pods_have_an_image(self) -> "RunConfig":
        if self.launcher == "kubernetes" and self.kubernetes.image is None:
            raise ValueError("launcher kubernetes needs kubernetes.image, an image that holds Convoy")
        return self

    @model_validator(mode="after")
    def _ranks_share_lanes(self) -> "RunConfig":
        if self.ranks is not None:
            check_world_size(self.lanes, self.ranks)
        return self

    def for_images(self, count: int) -> "RunConfig":
        """With a batch size for a training split of so many images, if none was asked for."""
        if self.batch_size:
            return self
        size = max(TrainConfig().batch_size, 2 * self.lanes)
        while size > 2 * self.lanes and count // size < STEPS_AN_EPOCH:
            size //= 2
        return self.model_copy(update={"batch_size": size})

    @property
    def promotes(self) -> bool:
        """Whether a version that passes its gates becomes champion."""
        return self.data.limit is None if self.promote is None else self.promote

    def training(self) -> TrainConfig:
        """The part that `cnn` trains by."""
        return TrainConfig.model_validate({key: getattr(self, key) for key in TrainConfig.model_fields})

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, defaults of the network's options included, as JSON types."""
        return self.model_dump(mode="json")


def recipes() -> dict[str, Path]:
    """The named configurations that come with Convoy."""
    return {file.stem: file for file in sorted(RECIPES.glob("*.yaml"))}


def networks() -> tuple[str, ...]:
    """Returns the names of the networks."""
    return tuple(NETWORKS)


def load_config(
    file: Path | None,
    settings: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
    *,
    recipe: str | None = None,
    base: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Read a configuration. Options win over settings, these over the file, and the file over recipe and base.

    Args:
        base: values that all else builds on.
        recipe: name of one of `recipes()`, which all else builds on.
        file: YAML mapping, or None.
        settings: `key=value` texts; a dot reaches into a section (`augment.shift=1`), the value is read as YAML.
        options: top-level keys that take precedence over both; None values are left out.

    Raises:
        UsageError: one line that names the file or key that is wrong, and the nearest that is right.
    """
    values = _merge({}, base or {})
    if recipe is not None:
        known = recipes()
        if recipe not in known:
            near = difflib.get_close_matches(recipe, known, n=1, cutoff=0)
            raise UsageError(f"unknown recipe {recipe!r}; did you mean {near[0]!r}?")
        values = _merge(values, _read(known[recipe]))
    if file:
        values = _merge(values, _read(file))
    read_settings(settings, values, example="lr=0.05")
    values |= {key: value for key, value in (options or {}).items() if value is not None}
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise UsageError(explain(error, RunConfig, values)) from None
    lengths = {key: len(json.dumps(value)) for key, value in config.model_dump(mode="json", exclude_unset=True).items()}
    if sum(lengths.values()) > LONGEST:
        key = max(lengths, key=lambda key: lengths[key])
        raise UsageError(
            f"{key}: {lengths[key]:,} characters; a whole configuration may have {LONGEST:,}, so shorten it"
        )
    return config


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Both, section by section; `over` wins."""
    merged = {**base}
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(value, Mapping):
            value = _merge(below if isinstance(below, Mapping) else {}, value)
        merged[key] = value
    return merged


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise UsageError(f"cannot read the configuration {file}: {reason}") from None
    values = read_yaml(text, str(file))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"{file} must hold keys and values, for example 'epochs: 5'")
    return values
