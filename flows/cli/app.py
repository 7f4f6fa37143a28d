"""The command line. Torch, Prefect and MLflow are loaded only by the commands that need them, once they need them."""
# ruff: noqa: E402

from infra.machine import stopping

stopping.listen()  # before all else, since a signal may come while the rest is imported

import os
import signal
from collections.abc import Callable
from enum import StrEnum
from functools import partial, wraps
from importlib.metadata import version
from inspect import Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.table import Table
from rich.text import Text

from flows.cli import models, notify, prediction, service, upkeep
from flows.cli.console import (
    describe,
    exit_status,
    foreseen,
    loading,
    print_pairs,
    say,
    servers_up,
    terminal,
)
from flows.summary import Summary, check_writable, write_summary
from infra.errors import UsageError
from infra.machine.output import outlive_readers
from infra.settings import Settings
from infra.sources.entries import CATALOGUE
from tasks.config.run import RunConfig, load_config, networks, recipes

INTERRUPTED, CTRL_C = 75, 130
STOPPABLE = ("train", "resume")
"""Commands that look for signals themselves; the others leave them their default actions."""

app = typer.Typer(
    name="convoy",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Retrain convolutional image classifiers: download, check, preprocess, train on all GPUs or cores, evaluate, "
    "register, and release what is good enough.\n\n"
    "Start with [bold]convoy train[/]: it brings up local servers, trains on Fashion-MNIST and says where to look.",
    epilog="Exit status: 0 done, 1 failed or a server did not answer, 2 your mistake, 3 a gate refused, "
    "75 interrupted, 130 Ctrl-C.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"convoy {version('convoy-cnn')}")
        raise typer.Exit


@app.callback()
def _begin(
    context: typer.Context,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UsageError("the working folder was removed; change to one that exists") from None
    if context.invoked_subcommand not in STOPPABLE:
        stopping.unlisten()


class Step(StrEnum):
    """Steps whose output is kept and found again."""

    download = "download"
    preprocess = "preprocess"


ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="YAML file of configuration keys; see `convoy config`.")
]
RecipeOption = Annotated[
    str | None,
    typer.Option(help=f"Named configuration to build on: {', '.join(recipes())}."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Set any key: -s lr=0.05 -s augment.shift=3. Repeatable."),
]
DatasetOption = Annotated[
    str | None,
    typer.Option(
        help=f"{', '.join(entry.name for entry in CATALOGUE)}; or a folder or archive of class sub-folders; "
        "or an s3:// or https:// address of one.",
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(help=f"Network: {', '.join(networks())}. Default: {RunConfig.model_fields['model'].default}."),
]
EpochsOption = Annotated[int | None, typer.Option(help="Passes over the training images.")]
RanksOption = Annotated[
    int | None, typer.Option(help="Processes; the result does not depend on it. Default: one a GPU, or one a core.")
]
NameOption = Annotated[str | None, typer.Option(help="Name of the registered model. Default: the dataset's.")]
SummaryOption = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the result as JSON, also on failure.")]
LimitOption = Annotated[int | None, typer.Option(help="Trial run on at most this many images of each split.")]


def _config(
    dataset: DatasetOption = None,
    model: ModelOption = None,
    epochs: EpochsOption = None,
    ranks: RanksOption = None,
    name: NameOption = None,
    limit: LimitOption = None,
    settings: SetOption = None,
    config_file: ConfigOption = None,
    recipe: RecipeOption = None,
) -> RunConfig:
    settings = [*(settings or []), *([f"data.limit={limit}"] if limit is not None else [])]
    options = {"dataset": dataset, "model": model, "epochs": epochs, "ranks": ranks, "name": name}
    return load_config(config_file, settings, options, recipe=recipe)


def configured(command: Callable[..., None]) -> Callable[..., None]:
    """Puts the options of `_config` before the command's own; its first argument is `_config` with what they say."""
    shared, (_, *own) = signature(_config).parameters, signature(command).parameters.values()

    @wraps(command)
    def run(**given: Any) -> None:
        command(partial(_config, **{name: given.pop(name) for name in shared}), **given)

    run.__dict__["__signature__"] = Signature([*shared.values(), *own])
    run.__annotations__ = {each.name: each.annotation for each in (*shared.values(), *own)}
    return run


@app.command()
@configured
def train(
    read: partial[RunConfig],
    refresh: Annotated[list[Step] | None, typer.Option(help="Do a step anew although its output exists.")] = None,
    summary: SummaryOption = None,
) -> None:
    """Train a network, evaluate and register it, and make it the champion if its gates let it pass.

    A key may be given by a recipe, in a file, by --set or by its own option; the later of these wins.

    [dim]convoy train --dataset digits --epochs 3[/]
    [dim]convoy train --dataset photos/ --set data.image_size=64 --set augment.flip=false[/]
    """

    def run() -> Summary:
        from infra.sources.entries import check_dataset, is_catalogued

        config = read()
        check_dataset(config.dataset)  # a wrong name should not have to wait for servers
        if os.path.isdir(config.dataset) and is_catalogued(config.dataset):
            say(
                f"{config.dataset} is the data set of that name; for the folder here, write ./{config.dataset}",
                error=True,
            )
        return _train(config, refresh or [])

    _summarised(run, summary, read.keywords["dataset"])


@app.command()
def resume(
    run: Annotated[str, typer.Argument(metavar="RUN", help="MLflow run id; `convoy runs` lists them.")],
    ranks: RanksOption = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change a key that is no part of the result."),
    ] = None,
    summary: SummaryOption = None,
) -> None:
    """Go on with a training that was interrupted, from its last checkpoint.

    Where its ranks run, and how many, may differ: the weights are those that the undisturbed training would have had.

    [dim]convoy resume $(convoy runs --last --id) --ranks 1 --set launcher=local[/]
    """

    def go_on() -> Summary:
        servers_up()
        with loading():
            from tasks.training.runs.run_record import check_resumable
        config = check_resumable(run)
        config = load_config(None, settings or (), {"ranks": ranks}, base=config.model_dump(exclude_unset=True))
        return _train(config, [], resume=run)

    _summarised(go_on, summary)


@app.command()
def runs(
    limit: Annotated[int, typer.Option(help="Show at most so many.", min=1)] = 20,
    last: Annotated[bool, typer.Option("--last", help="Only the newest.")] = False,
    only_id: Annotated[bool, typer.Option("--id", help="Only their ids, for scripts.")] = False,
) -> None:
    """List the trainings, the newest first: how they stand, and what can be resumed."""
    servers_up()
    with loading():
        from tasks.training.runs.run_list import list_trainings

    found = list_trainings(1 if last else limit)
    if only_id:
        typer.echo("\n".join(training.run_id for training in found))
        return
    table = Table("run", "started", "status", "checkpoint", "dataset", "model", "validation", box=None)
    for training in found:
        table.add_row(*training.cells())
    terminal(width=160).print(table if found else "No training yet.")  # ids are for copying: never shortened


MORE: dict[str, tuple[Callable[..., None], ...]] = {
    "Models": (models.promote, models.rollback, models.history, models.compare, prediction.predict, prediction.export),
    "Service": (
        *(service.deploy, service.worker, service.join, service.retrain, service.cancel, service.notify_data),
        *(notify.notify, upkeep.prune, upkeep.doctor),
    ),
}
for panel, commands in MORE.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)


@app.command()
@configured
def config(read: partial[RunConfig]) -> None:
    """Print the configuration that `convoy train` would use with the same options, as YAML for --config."""
    typer.echo(yaml.safe_dump(read().resolved(), sort_keys=False).rstrip())


@app.command()
def up() -> None:
    """Start the local servers (object storage, MLflow, Prefect) that are not running, and say where they are."""
    settings = Settings()  # afterwards the environment names them, as if they were external
    servers_up()
    _show_servers(settings)


@app.command()
def down() -> None:
    """Stop the local servers. What they stored stays."""
    from infra.stack import local_stack

    stopped = local_stack.down(Settings())
    typer.echo(f"Stopped {', '.join(stopped)}." if stopped else "No local server was running.")


@app.command()
def status() -> None:
    """Show the servers: where they are, and whether they answer."""
    _show_servers(Settings())


def _show_servers(settings: Settings) -> None:
    from infra.stack import local_stack

    colours = {"running": "green", "external": "cyan", "dead": "red", "stopped": "dim"}
    lines: dict[str, Text] = {}
    for server in local_stack.status(settings):
        log = f"  log {os.path.relpath(server.log)}" if server.log else ""
        state = (f"{server.state:8}", colours[server.state])
        lines[server.name] = Text.assemble(state, "  ", server.url, (log, "dim"))
    print_pairs(lines)


@app.command()
def env() -> None:
    """Print versions, devices and servers, for bug reports. Holds no secrets."""
    from tasks.upkeep.environment import describe

    print_pairs(describe())
    status()


def _summarised(run: Callable[[], Summary], file: Path | None, dataset: str | None = None) -> None:
    """Run something, and write how it went, also when it fails."""
    if file:
        check_writable(file)
    result = Summary(status="failed", dataset=dataset)
    try:
        with outlive_readers("stdout"):
            result = stopping.attended(run)
        if stopped := stopping.asked():  # too late to change anything but what we say
            result = _told_to_stop(result, stopped)
    except BaseException as raised:
        error = foreseen(raised)
        status = exit_status(error)
        kind = "interrupted" if status in (INTERRUPTED, CTRL_C) else "failed"
        result = result.model_copy(update={"status": kind, "error": describe(error), "exit_status": status})
        raise
    finally:
        if file:
            write_summary(file, result)
            stopping.at_end(lambda stopped: write_summary(file, _told_to_stop(result, stopped)))
    if result.error:
        say(f"convoy: {result.error}", error=True)
        raise typer.Exit(result.exit_status)


def _told_to_stop(result: Summary, stopped: stopping.Stopped) -> Summary:
    """Returns the result of a flow that had ended when a signal came; `champion` still says what its version became."""
    why = f"{stopped}, after the flow had ended: {result.headline}"
    return result.model_copy(update={"status": "interrupted", "error": why, "exit_status": stopped.exit_status})


def _train(config: RunConfig, refresh: list[Step], resume: str | None = None) -> Summary:
    servers_up()
    with loading():
        from flows.train import train_flow
        from tasks.orchestration.progress import show_task_logs

    show_task_logs()
    stopping.check()
    try:
        result = train_flow(config, frozenset(step.value for step in refresh), resume)
    except KeyboardInterrupt:  # where a program that calls us has kept Python's handler
        raise stopping.Stopped(signal.SIGINT) from None
    _print(result)
    return result


def _print(result: Summary) -> None:
    lines: dict[str, str | Text] = {"dataset": f"{result.dataset}, version {result.dataset_version}"}
    if result.accuracy is not None:
        speed = f"{result.images_per_second:,.0f} images/s on {result.world_size} ranks"
        place = "champion" if result.champion else "not champion"
        lines = {
            "accuracy": Text.assemble((f"{result.accuracy:.2%}", "bold green"), " of the test split"),
            "model": Text.assemble(f"{result.model_name}, version {result.model_version}: ", (place, "bold")),
            "verdict": result.verdict or "",
            "weights": f"SHA-256 {result.weights_sha256}",
            "time": f"{result.train_seconds:.0f} s of training ({speed}), {result.total_seconds:.0f} s in all",
            "reused": ", ".join(result.reused),
            "MLflow run": result.mlflow_run_url or "",
        }
    lines["Prefect run"] = result.prefect_flow_run_url or ""
    print_pairs({key: value for key, value in lines.items() if value})


def main() -> None:
    """Entry point. An error that we foresaw is one line; a traceback means a bug."""
    status = 0
    if os.environ.get("COLUMNS") == "0":  # as some terminals of editors and containers say: nothing would be shown
        del os.environ["COLUMNS"]
    with outlive_readers("stderr"):
        try:
            app(prog_name="convoy")
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except (stopping.Stopped, Exception) as raised:
            error = foreseen(raised)
            if not hasattr(error, "exit_status"):
                raise
            say(f"convoy: {describe(error)}", error=True)
            status = exit_status(error)
    stopping.end(status)
