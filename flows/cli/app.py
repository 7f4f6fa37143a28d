"""The command line. Only commands that need torch, Prefect or MLflow import them, and only when they need them."""
# ruff: noqa: E402

from infra.machine import stopping

stopping.listen()  # first, since a signal may arrive while the rest is imported

import os
import re
import signal
from collections.abc import Callable
from functools import partial, wraps
from importlib.metadata import version
from inspect import Signature, getdoc, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.table import Table
from rich.text import Text

from flows.cli import completion, data, models, notify, prediction, project, service, upkeep
from flows.cli.console import (
    JsonOption,
    as_known_error,
    configuration_file,
    describe,
    loading,
    print_json,
    print_line,
    print_pairs,
    print_whole,
    servers_to_read,
    servers_up,
)
from flows.cli.training import check_before_servers, run_training
from flows.summary import Refused, Summary, write_summary
from infra.errors import UsageError, counted
from infra.machine.files import check_writable
from infra.machine.output import outlive_readers
from infra.settings import Settings
from infra.sources.entries import CATALOGUE
from tasks.config.run import RunConfig, Step, load_config, recipes, with_network_options
from tasks.config.sweep import SweepConfig, SweepRequest, read_sweep

if TYPE_CHECKING:
    from infra.stack.local_stack import ServerStatus
    from tasks.config.deployment import ProjectConfig

INTERRUPTED_STATUSES = (75, 130)
HANDLE_SIGNALS = ("train", "sweep", "resume")
"""Commands that handle signals themselves; for the others the default actions are restored."""

app = typer.Typer(
    name="convoy",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Retrain convolutional image classifiers: download, check, preprocess, train on all GPUs or cores, evaluate, "
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
    typer.Option(
        help=f"Named configuration to build on: {', '.join(recipes())}.", autocompletion=completion.recipe_names
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="Set any key: -s lr=0.05 -s augment.shift=3. Repeatable.",
        autocompletion=completion.settings,
    ),
]
DatasetOption = Annotated[
    str | None,
    typer.Option(
        help=f"{', '.join(entry.name for entry in CATALOGUE)}; or a folder or archive of class sub-folders; or a label "
        "table (.csv, .tsv, .jsonl, .parquet) with the columns path and label; or the address of one.",
        autocompletion=completion.datasets,
    ),
]
_model = RunConfig.model_fields["model"]
ModelOption = Annotated[
    str | None,
    typer.Option(
        help=f"{' '.join((_model.description or '').split())} Default: {_model.default}.",
        autocompletion=completion.networks,
    ),
]
EpochsOption = Annotated[int | None, typer.Option(help="Passes over the training images.")]
RanksOption = Annotated[
    int | None, typer.Option(help="Processes; the result does not depend on it. Default: one per GPU or core.")
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
) -> "ProjectConfig":
    from tasks.config.deployment import load_project

    settings = [*(settings or []), *([f"data.limit={limit}"] if limit is not None else [])]
    options = {"dataset": dataset, "model": model, "epochs": epochs, "ranks": ranks, "name": name}
    project = load_project(configuration_file(config_file), settings, options, recipe=recipe)
    return with_network_options(project)


def configured(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options of `_config` to a command, which gets `_config` with their values as its first argument."""
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
    read_config: "partial[ProjectConfig]",
    refresh: Annotated[list[Step] | None, typer.Option(help="Repeat a step although its output exists.")] = None,
    summary: SummaryOption = None,
) -> None:
    """Train a network, evaluate and register it, and make it the champion if it passes its gates.

    A key is read from a recipe, a file (convoy.yaml, or --config), --set or its own option; the later of these wins.

    [dim]convoy train --dataset digits --epochs 3[/]
    [dim]convoy train --dataset photos/ --set data.image_size=64 --set augment.flip=false[/]
    """

    def run() -> Summary:
        config = read_config().run
        check_before_servers(config)
        return _train(config, refresh or [])

    _run_with_summary(run, summary, read_config.keywords["dataset"])


@app.command()
@configured
def sweep(
    read_config: "partial[ProjectConfig]",
    space: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML: keys with ranges or lists of values.", show_default=False)
    ] = None,
    trials: Annotated[int | None, typer.Option(help="Configurations to try. Default: 27.", show_default=False)] = None,
    eta: Annotated[
        int | None,
        typer.Option(
            help="One of so many trials goes on at each rung, to so many times the epochs. Default: 3.",
            show_default=False,
        ),
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="val/accuracy or val/loss. Default: val/accuracy.", show_default=False)
    ] = None,
    at_once: Annotated[
        int | None,
        typer.Option(min=1, help="Trials to run at a time. Default: one per core. The result does not depend on it."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the rungs and what they cost; start nothing.")
    ] = False,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN", help="Go on with a sweep that has stopped, by its MLflow run.")
    ] = None,
    summary: SummaryOption = None,
) -> None:
    """Search for the best configuration: many are trained for a few epochs, and the better ones go on.

    A trial that goes on continues from its checkpoint: it ends with the weights of an uninterrupted training. The best
    one is registered and judged like any version. A file with `lr: {low: 0.05, high: 0.8, log: true}` says what to try.

    [dim]convoy sweep --space space.yaml --trials 27 --dry-run[/]
    [dim]convoy sweep --dataset photos/ --space space.yaml --trials 9 --epochs 9[/]
    """
    if (space is None) == (resume is None):
        raise UsageError("give a --space to search, or the sweep to --resume")
    if dry_run and resume:
        raise UsageError("--dry-run and --resume exclude each other")
    chosen = {"trials": trials, "eta": eta, "metric": metric}
    given = [name for name, value in (read_config.keywords | chosen).items() if value not in (None, [], "")]
    if resume and given:
        raise UsageError(f"--resume goes on with what the sweep was started with; leave out {', '.join(given)}")
    config = read_config().run
    asked = SweepRequest(resume=resume, at_once=at_once)
    if space:
        asked = asked.model_copy(update={"sweep": read_sweep(space, chosen, config)})
    if config.launcher != "local":
        raise UsageError("a sweep trains on this machine; leave out `launcher`")
    if dry_run and asked.sweep:
        _print_rungs(asked.sweep, config.epochs)
        return

    def run() -> Summary:
        begun = config
        if resume:
            servers_up()
            with loading():
                from tasks.training.sweep import read_sweep_record
            begun = read_sweep_record(resume).config
        else:
            check_before_servers(config)
        with loading():
            from tasks.training.sweep import at_a_time
        at_a_time(begun, at_once)
        return _train(begun, [], sweep=asked)

    _run_with_summary(run, summary, read_config.keywords["dataset"])


def _print_rungs(sweep: SweepConfig, epochs: int) -> None:
    table = Table("rung", "trials", "trained to epoch", "epochs", box=None)
    for number, rung in enumerate(sweep.rungs(epochs), start=1):
        table.add_row(*map(str, (number, rung.trials, rung.epoch, rung.cost)))
    print_whole(table)
    cost, whole = sweep.cost(epochs), sweep.trials * epochs
    typer.echo(f"{cost} epochs, {cost / whole:.0%} of the {whole} of {sweep.trials} whole trainings")


@app.command()
def resume(
    run: Annotated[str, typer.Argument(metavar="RUN", help="MLflow run id; `convoy runs` lists them.")],
    ranks: RanksOption = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change a key that does not affect the result."),
    ] = None,
    summary: SummaryOption = None,
) -> None:
    """Continue an interrupted training from its last checkpoint.

    The number and the place of its ranks may differ: the weights are the same as without the interruption.

    [dim]convoy resume $(convoy runs --last --id) --ranks 1 --set launcher=local[/]
    """

    def go_on() -> Summary:
        servers_up()
        with loading():
            from tasks.training.runs.run_record import check_resumable, check_same_result
        given = check_resumable(run)
        config = load_config(None, settings or (), {"ranks": ranks}, base=given.model_dump(exclude_unset=True))
        check_same_result(run, given, config)
        return _train(config, [], resume=run)

    _run_with_summary(go_on, summary)


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
    for training in found:
        table.add_row(*training.cells())
    print_whole(table if found else "No training yet.")


PANELS: dict[str, tuple[Callable[..., None], ...]] = {
    "Models": (
        *(models.models, models.promote, models.rollback, models.history, models.compare),
        *(prediction.predict, prediction.errors, prediction.export),
    ),
    "Service": (
        *(
            configured(service.deploy),
            service.worker,
            service.join,
            service.retrain,
            service.trial,
            service.cancel,
            service.notify_data,
        ),
        *(notify.notify, upkeep.prune, upkeep.doctor),
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


def _run_with_summary(run: Callable[[], Summary], file: Path | None, dataset: str | None = None) -> None:
    """Runs a flow and writes its summary to a file, also when it fails."""
    if file:
        check_writable(file, "--summary")
    result = Summary(status="failed", dataset=dataset)
    try:
        with outlive_readers("stdout"):
            result = stopping.attended(run)
        if stopped := stopping.asked():  # the flow has ended: only the summary can still change
            result = _stopped_after_end(result, stopped)
    except BaseException as raised:
        error = as_known_error(raised)
        status = getattr(error, "exit_status", 1)
        kind = "interrupted" if status in INTERRUPTED_STATUSES else "failed"
        result = result.model_copy(update={"status": kind, "error": describe(error), "exit_status": status})
        raise
    finally:
        if file:
            write_summary(file, result)
            stopping.at_end(lambda stopped: write_summary(file, _stopped_after_end(result, stopped)))
    if result.error:
        print_line(f"convoy: {result.error}", error=True)
        raise typer.Exit(result.exit_status)


def _stopped_after_end(result: Summary, stopped: stopping.Stopped) -> Summary:
    """Returns the summary of a flow that had ended when a signal arrived; `champion` keeps its value."""
    why = f"{stopped}, after the flow had ended: {result.headline}"
    return result.model_copy(update={"status": "interrupted", "error": why, "exit_status": stopped.exit_status})


def _train(
    config: RunConfig, refresh: list[Step], resume: str | None = None, sweep: SweepRequest | None = None
) -> Summary:
    try:
        result = run_training(config, refresh, resume, sweep=sweep)
    except Refused as refused:
        result = refused.summary
    except KeyboardInterrupt:  # if a program that calls this function kept Python's signal handler
        raise stopping.Stopped(signal.SIGINT) from None
    _print(result)
    return result


def _print(result: Summary) -> None:
    version = f", version {result.dataset_version}" if result.dataset_version else ""
    lines: dict[str, str | Text] = {"dataset": f"{result.dataset}{version}"}
    if result.accuracy is not None:
        speed = f"{result.images_per_second:,.0f} images/s on {counted(result.world_size or 0, 'rank')}"
        place = "champion" if result.champion else "not champion"
        # After a resume, the training also counts the time of earlier starts.
        since = "in all" if (result.train_seconds or 0.0) <= (result.total_seconds or 0.0) else "since the resume"
        lines = {
            "accuracy": Text.assemble((f"{result.accuracy:.2%}", "bold green"), " of the test split"),
            "model": Text.assemble(f"{result.model_name}, version {result.model_version}: ", (place, "bold")),
            "verdict": "" if result.error else result.verdict or "",  # the error line, which follows, has it too
            "approval": result.approval if result.approval and result.approval not in (result.error or "") else "",
            "weights": f"SHA-256 {result.weights_sha256}",
            "time": f"{result.train_seconds:.0f} s of training ({speed}), {result.total_seconds:.0f} s {since}",
            "devices": result.utilisation.line if result.utilisation else "",
            "sweep": _found(result.sweep) if result.sweep else "",
            "reused": ", ".join(result.reused),
            "MLflow run": result.mlflow_run_url or "",
            "all runs": result.mlflow_runs_url or "",
        }
    lines["Prefect run"] = result.prefect_flow_run_url or ""
    print_pairs({key: value for key, value in lines.items() if value})


def _found(sweep: dict[str, Any]) -> str:
    """Returns what a sweep has found, as one line."""
    values = ", ".join(f"{key}={value}" for key, value in sweep["values"].items())
    return (
        f"trial {sweep['best_trial']} of {sweep['trials']}: {values}; {sweep['epochs']} epochs in place of "
        f"{sweep['grid_epochs']}"
    )


def main() -> None:
    """Runs the command line. A known error is printed as one line; a traceback means a bug."""
    status = 0
    if os.environ.get("COLUMNS") == "0":  # set by some terminals of editors and containers; nothing would be shown
        del os.environ["COLUMNS"]
    with outlive_readers("stderr"):
        try:
            app(prog_name="convoy")
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except (stopping.Stopped, Exception) as raised:
            error = as_known_error(raised)
            if not hasattr(error, "exit_status"):
                raise
            print_line(f"convoy: {describe(error)}", error=True)
            status = error.exit_status
    stopping.end(status)
