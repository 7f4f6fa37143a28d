"""The command line. Only commands that need torch, Prefect or MLflow import them, and only when they need them."""
# ruff: noqa: E402

from infra.machine import stopping

stopping.listen()  # first, since a signal may arrive while the rest is imported

import os
import re
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from inspect import getdoc
from typing import TYPE_CHECKING, Annotated

import typer
import yaml
from rich.table import Table
from rich.text import Text

from flows.cli import data, models, notify, prediction, project, service, training, upkeep
from flows.cli.console import (
    JsonOption,
    as_known_error,
    describe,
    loading,
    print_json,
    print_line,
    print_pairs,
    print_whole,
    servers_to_read,
    servers_up,
)
from flows.cli.options import configured
from infra.errors import UsageError, one_line
from infra.machine.output import outlive_readers
from infra.settings import Settings

if TYPE_CHECKING:
    from infra.stack.local_stack import ServerStatus
    from tasks.config.deployment import ProjectConfig

HANDLE_SIGNALS = ("train", "sweep", "resume")
"""Commands that handle signals themselves; for the others the default actions are restored."""

app = typer.Typer(
    name="convoy",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Retrain convolutional image classifiers: download, check, preprocess, train on your GPUs or cores, evaluate, "
    "register, and release what is good enough.\n\n"
    "Start with [bold]convoy train[/]: it starts local servers, trains on Fashion-MNIST and prints where the results "
    "are.",
    epilog="Exit status: 0 done, 1 failed or a server did not answer, 2 your mistake, 3 a gate refused, "
    "75 interrupted, 130 Ctrl-C.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"convoy {version('convoy-cnn')}")
        raise typer.Exit


@app.callback()
def _before_command(
    context: typer.Context,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UsageError("the working folder was removed; change to one that exists") from None
    if context.invoked_subcommand not in HANDLE_SIGNALS:
        stopping.unlisten()


for command in (training.train, training.sweep, training.resume):
    app.command()(command)


@app.command()
def runs(
    limit: Annotated[int, typer.Option(help="Show at most this many.", min=1)] = 20,
    last: Annotated[bool, typer.Option("--last", help="Show only the newest.")] = False,
    only_id: Annotated[bool, typer.Option("--id", help="Print only ids, for scripts.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the trainings, the newest first, with status, last checkpoint, registered version, accuracy and verdict.

    Starts no server: `convoy up` does.
    """
    if only_id and as_json:
        raise UsageError("--id and --json exclude each other")
    servers_to_read()
    with loading():
        from tasks.training.runs.run_list import list_trainings

    found = list_trainings(1 if last else limit)
    if as_json:
        print_json(found)
        return
    if only_id:
        typer.echo("\n".join(training.run_id for training in found))
        return
    columns = ("run", "started", "status", "checkpoint", "dataset", "network", "model", "validation", "test", "verdict")
    table = Table(*columns, box=None)
    for each in found:
        table.add_row(*each.cells())
    print_whole(table if found else "No training yet.")


PANELS: dict[str, tuple[Callable[..., None], ...]] = {
    "Models": (
        *(models.models, models.promote, models.rollback, models.history, models.compare),
        *(prediction.predict, prediction.errors, prediction.export),
    ),
    "Service": (
        *(configured(service.deploy), service.worker, service.join, service.retrain, service.trial, service.cancel),
        *(service.notify_data, notify.notify, upkeep.prune, upkeep.doctor),
    ),
}
for panel, commands in PANELS.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)


app.add_typer(data.app, name="data", rich_help_panel="Models")


@app.command()
@configured
def config(
    read_config: "partial[ProjectConfig]",
    explain: Annotated[
        bool, typer.Option("--explain", help="Add a comment to each key: what it sets, its default and its values.")
    ] = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of all configurations instead, for editors.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Print the configuration that `convoy train` would use with the same options, as YAML for --config.

    [dim]convoy config --model notes --explain > recipe.yaml[/]
    """
    from tasks.config.deployment import ProjectConfig
    from tasks.config.explain import explained
    from tasks.config.keys import schema_of

    if explain + schema + as_json > 1:
        raise UsageError("--explain, --schema and --json exclude each other")
    found = read_config().run
    if schema:
        print_json(schema_of(ProjectConfig))
    elif as_json:
        print_json(found.resolved())
    elif explain:
        typer.echo(explained(found))
    else:
        typer.echo(yaml.safe_dump(found.resolved(), sort_keys=False).rstrip())


app.command()(project.init)


@app.command()
def up(as_json: JsonOption = False) -> None:
    """Start the local servers (object storage, MLflow, Prefect) that are not running, and print their addresses."""
    settings = Settings()  # read first: servers_up() puts addresses into the environment, as if they were external
    servers_up()
    _show_servers(settings, as_json)


@app.command()
def down() -> None:
    """Stop the local servers. Their data stay."""
    from infra.stack import local_stack

    stopped = local_stack.down(Settings())
    typer.echo(f"Stopped {', '.join(stopped)}." if stopped else "No local server was running.")


@app.command()
def status(
    work: Annotated[bool, typer.Option("--work", help="Show only the work, not the servers.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the servers, and what the service does: workers, trainings that run, wait or have died, the next runs.

    Starts no server. With --json, it prints the servers, or with --work the work.

    [dim]convoy status --work --json[/]
    """
    servers = [] if work else _show_servers(Settings(), as_json)
    if (as_json and not work) or any(each.name == "prefect" and each.state in ("stopped", "dead") for each in servers):
        return
    servers_to_read(only=["prefect"])
    with loading():
        from flows.activity import activities

        found = activities()
    if as_json:
        print_json(found)
        return
    table = Table("", "what", "where it stands", box=None, show_header=False)
    for each in found:
        table.add_row(*each.cells())
    if servers:
        print_line("")
    print_whole(table if found else "No worker is online, nothing runs, and no schedule is on.")


def _show_servers(settings: Settings, as_json: bool) -> "list[ServerStatus]":
    from infra.stack import local_stack

    found = local_stack.status(settings)
    if as_json:
        print_json(found)
        return found
    colours = {"running": "green", "external": "cyan", "dead": "red", "stopped": "dim"}
    lines: dict[str, Text] = {}
    for server in found:
        log = f"  log {os.path.relpath(server.log)}" if server.log else ""
        state = (f"{server.state:8}", colours[server.state])
        lines[server.name] = Text.assemble(state, "  ", server.url, (log, "dim"))
    print_pairs(lines)
    return found


@app.command()
def env(as_json: JsonOption = False) -> None:
    """Print versions, devices and servers for bug reports, without secrets."""
    from infra.stack import local_stack
    from tasks.upkeep.environment import describe

    if as_json:
        print_json(describe() | {"servers": local_stack.status(Settings())})
        return
    print_pairs(describe())
    _show_servers(Settings(), as_json)


for registered in (*app.registered_commands, *data.app.registered_commands):
    # Typer keeps the line breaks of the source, so that a narrow terminal shows them next to its own.
    registered.help = re.sub(r"(?<!\n)\n(?!\n|\[dim\])", " ", getdoc(registered.callback) or "")


def main() -> None:
    """Runs the command line. A known error is printed as one line; a traceback means a bug."""
    status = 0
    if os.environ.get("COLUMNS") == "0":  # set by some terminals of editors and containers; nothing would be shown
        del os.environ["COLUMNS"]
    with outlive_readers("stderr"):
        try:
            ended = app(prog_name="convoy", standalone_mode=False)  # else it prints wrong arguments in a box
            status = ended if isinstance(ended, int) else 0
        except typer.TyperException as raised:  # a wrong argument
            status = raised.exit_code
            if message := one_line(raised.format_message()):  # else there was none at all, and the help was shown
                context = getattr(raised, "ctx", None)
                shown = context.command_path if context else "convoy"
                print_line(f"convoy: {message.rstrip('.?')}; see `{shown} --help`", error=True)
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except (stopping.Stopped, Exception) as raised:
            error = as_known_error(raised)
            if not hasattr(error, "exit_status"):
                raise
            print_line(f"convoy: {describe(error)}", error=True)
            status = error.exit_status
    stopping.end(status)
