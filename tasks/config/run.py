"""The configuration of a whole run, read from a file, `--set` and options.

Importing this loads pydantic only, so that mistakes are refused before torch, Prefect or MLflow are loaded.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, field_validator, model_validator

from cnn.config.base import Config
from cnn.config.data_checks import DataGateConfig
from cnn.config.networks import is_own
from cnn.config.preprocessing import MAX_DEFAULT_SIZE, MAX_PRETRAINED_SIZE, PreprocessConfig
from cnn.config.training import RESOLVE_OPTIONS, TrainConfig
from cnn.distributed.world_size import check_world_size
from cnn.networks.own import digests, own_network
from infra.errors import UsageError
from infra.sources.entries import CATALOGUE
from infra.tracking.names import model_name_fault
from tasks.config.gates import GateConfig, ServingConfig
from tasks.config.key_values import explain, read_settings
from tasks.config.launchers import KubernetesConfig, Launcher, NodesConfig, RayConfig
from tasks.config.plain_yaml import read_yaml

MIN_STEPS_PER_EPOCH = 20  # where Convoy chooses the batch size
MAX_CHARACTERS = 100_000  # of a configuration as JSON, which is a parameter of flow runs, and tags of MLflow's runs
Run = TypeVar("Run", bound="RunConfig")
RECIPES = Path(__file__).parent / "recipes"


class Step(StrEnum):
    """Steps whose stored output is reused."""

    download = "download"
    preprocess = "preprocess"


class CheckpointConfig(Config):
    """When checkpoints are stored; the result does not depend on it (`checkpoints.*`)."""

    every: float = Field(30.0, ge=0)
    """Seconds between checkpoints; one more is stored at the end of each epoch."""

    keep: int = Field(2, ge=1)
    """Number of newest checkpoints to keep; the one with the best validation accuracy is kept in addition."""

    patience: float = Field(1800.0, gt=0)
    """Seconds to continue training while no checkpoint can be stored."""


class ResumeConfig(Config):
    """How a training of a deployment goes on by itself after its process died (`resume.*`)."""

    limit: int = Field(3, ge=0)
    """Resumptions in a row without a newer checkpoint, before the training is given up. 0: none at all."""


class RunConfig(TrainConfig):
    """All keys of `convoy train`. The dataset, `data` and the keys of `TrainConfig` decide the weights."""

    dataset: str = "fashion-mnist"
    """A catalogue name; a folder of class sub-folders or a label table (.csv, .tsv, .jsonl or .parquet, with the
    columns `path` and `label`), local or s3://; or an archive of class sub-folders, local, s3:// or https://."""

    name: str | None = None
    """Name of the registered model. Unset: the dataset's name."""

    batch_size: int = Field(0, ge=0)
    """Images in a global batch, over all ranks; a multiple of `lanes`. 0: 256, or fewer for a small training split."""

    ranks: int | None = Field(None, ge=1, le=4096)
    """Processes to train with; the result does not depend on it. Unset: one per GPU or core, as far as lanes allow."""

    launcher: Launcher = "local"
    """Where the ranks run; the result does not depend on it. `local`: on this machine. `nodes`: on it and on each that
    has called `convoy join`. `ray`: in actors of a Ray cluster. `kubernetes`: in the pods of a Job."""

    nodes: NodesConfig = NodesConfig()

    ray: RayConfig = RayConfig()

    kubernetes: KubernetesConfig = KubernetesConfig()

    data: PreprocessConfig = PreprocessConfig()

    checkpoints: CheckpointConfig = CheckpointConfig()

    restarts: int = Field(3, ge=0)
    """Restarts of died ranks in a row without progress, before the training is given up."""

    resume: ResumeConfig = ResumeConfig()

    profile: int = Field(0, ge=0, le=1000)
    """Steps of rank 0 to trace with PyTorch's profiler, near the start. The MLflow run gets `profile/trace.json.gz`,
    which https://ui.perfetto.dev opens; with `launcher=local` only. 0: none."""

    data_gate: DataGateConfig = DataGateConfig()

    serving: ServingConfig = ServingConfig()

    gate: GateConfig = GateConfig()

    promote: bool | None = None
    """Make a version that passes its gates the champion. Unset: yes, except in a trial run (`data.limit`)."""

    approval: bool = False
    """Wait before a promotion until a person approves it in Prefect, with a name and a reason."""

    warm_start: bool = False
    """Start `convoy retrain` from the champion's weights instead of fresh ones."""

    approval_patience: float = Field(86_400.0, gt=0, le=315_360_000.0)
    """Seconds to wait for an approval."""

    @model_validator(mode="before")
    @classmethod
    def _no_mirror_images_of_digits(cls, values: Any) -> Any:
        """Switches `augment.flip` off, unless it is set, for data sets whose images must not be mirrored."""
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
        """Refuses addresses that give access, since Prefect and MLflow show parameters."""
        scheme, separator, rest = dataset.partition("://")
        if separator:
            dataset = f"{scheme.lower()}://{rest}"
        if not dataset.strip():
            raise ValueError("it is empty; name a data set, a folder (`.` for this one), an archive or an address")
        address = urlsplit(dataset)
        _ = address.port  # raises ValueError if it is no number
        if address.scheme in ("http", "https") and (address.query or "@" in address.netloc):
            raise ValueError(
                "an address with a password or a query would be stored with the run, visible to all; "
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
        """Returns the configuration with a batch size for this number of training images, unless it has one."""
        if self.batch_size:
            return self
        size = max(TrainConfig().batch_size, 2 * self.lanes)
        while size > 2 * self.lanes and count // size < MIN_STEPS_PER_EPOCH:
            size //= 2
        return self.model_copy(update={"batch_size": size})

    @property
    def promotes(self) -> bool:
        """Whether a version that passes its gates becomes champion."""
        return self.data.limit is None if self.promote is None else self.promote

    @property
    def max_default_size(self) -> int:
        """Limit in pixels of an unset `data.image_size`."""
        return MAX_PRETRAINED_SIZE if self.pretrained else MAX_DEFAULT_SIZE

    def training(self) -> TrainConfig:
        """Returns the part of the configuration that `cnn` needs."""
        return TrainConfig.model_validate({key: getattr(self, key) for key in TrainConfig.model_fields})

    def resolved(self) -> dict[str, Any]:
        """Returns every key with its value as JSON types, including defaults of the network's options."""
        return self.model_dump(mode="json")


def recipes() -> dict[str, Path]:
    """Returns the files of the named configurations that come with Convoy, by name."""
    return {file.stem: file for file in sorted(RECIPES.glob("*.yaml"))}


def load_as(
    model: type[Run],
    file: Path | None,
    settings: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
    *,
    recipe: str | None = None,
    base: Mapping[str, Any] | None = None,
) -> Run:
    """Reads a configuration. Options override settings, then come the file, the recipe and the base.

    Args:
        file: YAML mapping, or None.
        settings: `key=value` texts; a dot separates section and key (`augment.shift=1`), the value is read as YAML.
        options: keys, and sections with their keys; None values are ignored.
        recipe: name of one of `recipes()`; replaces the key `recipe`, if the model has it.
        base: values of lowest precedence.

    Raises:
        UsageError: one line that names the wrong file or key, and the nearest valid key.
    """
    given = _read(file) if file else {}
    values = _merge({}, base or {})
    settings = list(settings)
    chosen: dict[str, Any] = {"recipe": given.get("recipe")}
    read_settings((each for each in settings if each.partition("=")[0].strip() == "recipe"), chosen, example="lr=0.05")
    name = recipe or (chosen["recipe"] if "recipe" in model.model_fields else None)
    if name is not None:
        values = _merge(values, _read(_recipe(name, f"{file}: " if file and name is given.get("recipe") else "")))
    values = _merge(values, given)
    read_settings(settings, values, example="lr=0.05")
    values = _merge(values, {key: value for key, value in (options or {}).items() if value is not None})
    try:
        config = model.model_validate(values)
    except ValidationError as error:
        from_file = any(_holds(given, detail["loc"], detail["input"]) for detail in error.errors())
        raise UsageError((f"{file}: " if from_file else "") + explain(error, model, values)) from None
    lengths = {key: len(json.dumps(value)) for key, value in config.model_dump(mode="json", exclude_unset=True).items()}
    if sum(lengths.values()) > MAX_CHARACTERS:
        key = max(lengths, key=lambda key: lengths[key])
        raise UsageError(
            f"{key}: {lengths[key]:,} characters; a whole configuration may have {MAX_CHARACTERS:,}, so shorten it"
        )
    return config


load_config = partial(load_as, RunConfig)
"""Reads the configuration of a training."""


def with_network_options(config: Run) -> Run:
    """Returns the configuration with all options of a network of one's own, checked against its signature.

    Imports the network's module, and what this imports, PyTorch above all; of another network, it imports nothing.

    Raises:
        InputError: the network cannot be used.
        UsageError: an option is unknown, missing or of a wrong type; the message names the nearest key.
    """
    if not is_own(config.model):
        return config
    network = own_network(config.model)
    now = digests(network.folder, network.files)
    if changed := [file for file, digest in network.files.items() if now[file] != digest]:
        raise UsageError(f"{config.model}: {changed[0]} has changed since this program loaded it; restart the program")
    values = {"network": {}} | config.model_dump(exclude_unset=True)  # what is set stays in `ProjectConfig.run`
    try:
        return type(config).model_validate(values, context={RESOLVE_OPTIONS: network.resolved})
    except ValidationError as error:
        raise UsageError(explain(error, type(config), values)) from None


def _recipe(name: object, where: str) -> Path:
    """Returns the file of a recipe.

    Raises:
        UsageError: there is no such recipe; the message begins with `where` and names the nearest.
    """
    known = recipes()
    if str(name) not in known:  # since YAML may hold a list
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0)
        raise UsageError(f"{where}unknown recipe {name!r}; did you mean {near[0]!r}?")
    return known[str(name)]


def _holds(given: Any, path: Iterable[int | str], value: object) -> bool:
    """Returns whether the values of a file have this value at the path of an error."""
    for name in (path := tuple(path)):
        if not isinstance(given, Mapping) or name not in given:
            return False
        given = given[name]
    return bool(path) and bool(given == value)


def _merge(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """Merges two configurations, section by section."""
    merged = {**base}
    for key, value in override.items():
        below = merged.get(key)
        if isinstance(value, Mapping):
            value = _merge(below if isinstance(below, Mapping) else {}, value)
        merged[key] = value
    return merged


def read_file(file: Path, what: str) -> Any:
    """Returns what a YAML file holds.

    Args:
        what: the file's purpose, for messages.

    Raises:
        UsageError: it cannot be read, or is not YAML.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise UsageError(f"cannot read the {what} {file}: {reason}") from None
    return read_yaml(text, str(file))


def _read(file: Path) -> dict[str, Any]:
    values = read_file(file, "configuration")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"{file} must hold keys and values, for example 'epochs: 5'")
    return values
