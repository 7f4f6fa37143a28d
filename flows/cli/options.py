"""Options that several commands share, and what the shell completes for them.

A function that completes gets the word so far. Where nothing here fits, the shell completes names of files.
"""

from collections.abc import Callable, Iterable
from functools import partial, wraps
from inspect import Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.console import configuration_file
from infra.sources.entries import CATALOGUE
from tasks.config.run import RunConfig, recipes, with_network_options

if TYPE_CHECKING:
    from tasks.config.deployment import ProjectConfig


def _datasets(incomplete: str) -> list[str]:
    """Returns names of the catalogue."""
    return _beginning(incomplete, (entry.name for entry in CATALOGUE))


def _recipe_names(incomplete: str) -> list[str]:
    """Returns names of recipes."""
    return _beginning(incomplete, recipes())


def _networks(incomplete: str) -> list[str]:
    """Returns names of networks; of those before a `/`, such as timm's thousand, only that first part."""
    from tasks.config.keys import network_names

    names = network_names()
    if "/" not in incomplete:
        names = list(dict.fromkeys(name[: name.find("/") + 1] or name for name in names))
    return _beginning(incomplete, names)


def _settings(incomplete: str) -> list[str]:
    """Returns keys as `KEY=`."""
    from tasks.config.deployment import ProjectConfig
    from tasks.config.key_values import known_keys

    return _beginning(incomplete, (f"{key}=" for key in known_keys(ProjectConfig)))


def _beginning(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def set_option(help: str, *, completed_by: Callable[[str], list[str]] | None = None) -> Any:
    """Returns the option `--set`; which keys it takes, the help of each command says."""
    return typer.Option("--set", "-s", metavar="KEY=VALUE", help=help, autocompletion=completed_by)


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        help="YAML file of configuration keys; see `convoy config`. Default: convoy.yaml, if it is here; "
        "/dev/null is no file.",
    ),
]
RecipeOption = Annotated[
    str | None,
    typer.Option(help=f"Named configuration to build on: {', '.join(recipes())}.", autocompletion=_recipe_names),
]
SetOption = Annotated[
    list[str] | None, set_option("Set any key: -s lr=0.05 -s augment.shift=3. Repeatable.", completed_by=_settings)
]
DatasetOption = Annotated[
    str | None,
    typer.Option(
        help=f"{', '.join(entry.name for entry in CATALOGUE)}; or a folder or archive of class sub-folders; or a label "
        "table (.csv, .tsv, .jsonl, .parquet) with the columns path and label; here, at an s3:// address or, for an "
        "archive, an https:// address.",
        autocompletion=_datasets,
    ),
]
_model = RunConfig.model_fields["model"]
ModelOption = Annotated[
    str | None,
    typer.Option(
        help=f"{' '.join((_model.description or '').split())} Default: {_model.default}.",
        autocompletion=_networks,
    ),
]
EpochsOption = Annotated[int | None, typer.Option(help="Passes over the training images.")]
RanksOption = Annotated[
    int | None,
    typer.Option(
        help="Processes; the result does not depend on it. Default: one per GPU or core, at most `lanes`; in a sweep "
        "on CPUs, one per trial."
    ),
]
NameOption = Annotated[str | None, typer.Option(help="Name of the registered model. Default: the dataset's.")]
SummaryOption = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the result as JSON, also on failure.")]
LimitOption = Annotated[int | None, typer.Option(help="Trial run on at most this many images of each split.")]


def read_project(
    dataset: DatasetOption = None,
    model: ModelOption = None,
    epochs: EpochsOption = None,
    ranks: RanksOption = None,
    name: NameOption = None,
    limit: LimitOption = None,
    settings: SetOption = None,
    config_file: ConfigOption = None,
    recipe: RecipeOption = None,
) -> "ProjectConfig":
    """Reads the configuration that the options give."""
    from tasks.config.deployment import load_project

    settings = [*(settings or []), *([f"data.limit={limit}"] if limit is not None else [])]
    options = {"dataset": dataset, "model": model, "epochs": epochs, "ranks": ranks, "name": name}
    project = load_project(configuration_file(config_file), settings, options, recipe=recipe)
    return with_network_options(project)


def configured(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options of `read_project` to a command, whose first argument becomes that function with their values."""
    shared, (_, *own) = signature(read_project).parameters, signature(command).parameters.values()

    @wraps(command)
    def run(**given: Any) -> None:
        command(partial(read_project, **{name: given.pop(name) for name in shared}), **given)

    run.__dict__["__signature__"] = Signature([*shared.values(), *own])
    run.__annotations__ = {each.name: each.annotation for each in (*shared.values(), *own)}
    return run
