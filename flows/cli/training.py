"""The commands that train in this process: `train`, `sweep`, `resume`."""

import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from flows.cli.console import as_known_error, describe, loading, print_line, print_pairs, print_whole, servers_up
from flows.cli.in_process import check_before_servers, run_training
from flows.cli.options import SummaryOption, configured, set_option
from flows.summary import Refused, Summary, write_summary
from infra.errors import UsageError, counted
from infra.machine import stopping
from infra.machine.files import check_writable
from infra.machine.output import outlive_readers
from tasks.config.run import RunConfig, Step, load_config
from tasks.config.sweep import SweepConfig, SweepRequest, read_sweep

if TYPE_CHECKING:
    from tasks.config.deployment import ProjectConfig

INTERRUPTED_STATUSES = (75, 130)
OPTIONS = {"config_file": "config", "settings": "set"}
"""Names of the options whose parameters have another name."""


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
        typer.Option(
            min=1,
            help="Trials to run at a time; the result does not depend on it. Default: as the cores allow; one on GPUs.",
        ),
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
    if dry_run and resume is not None:
        raise UsageError("--dry-run and --resume exclude each other")
    chosen = {"trials": trials, "eta": eta, "metric": metric}
    given = [name for name, value in (read_config.keywords | chosen).items() if value not in (None, [], "")]
    if resume is not None and given:
        options = ", ".join(f"--{OPTIONS.get(name, name)}" for name in given)
        raise UsageError(f"--resume goes on with what the sweep was started with; leave out {options}")

    def read() -> tuple[RunConfig, SweepConfig]:
        assert space
        config = read_config().run
        if config.launcher != "local":
            raise UsageError("a sweep trains on this machine; leave out `launcher`")
        return config, read_sweep(space, chosen, config)

    if dry_run:
        config, search = read()
        _print_rungs(search, config.epochs)
        return

    def run() -> Summary:
        search = None
        if resume is None:
            config, search = read()
            check_before_servers(config)
        else:
            servers_up()
            with loading():
                from tasks.training.sweep import read_sweep_record
            config = read_sweep_record(resume).config
        with loading():
            from tasks.training.sweep import at_a_time
        at_a_time(config, at_once)
        return _train(config, [], sweep=SweepRequest(sweep=search, resume=resume, at_once=at_once))

    _run_with_summary(run, summary, read_config.keywords["dataset"])


def _print_rungs(sweep: SweepConfig, epochs: int) -> None:
    table = Table("rung", "trials", "trained to epoch", "epochs", box=None)
    for number, rung in enumerate(sweep.rungs(epochs), start=1):
        table.add_row(*map(str, (number, rung.trials, rung.epoch, rung.trials * rung.epochs)))
    print_whole(table)
    cost, whole = sweep.cost(epochs), sweep.trials * epochs
    typer.echo(f"{cost} epochs, {cost / whole:.0%} of the {whole} of {sweep.trials} whole trainings")


def resume(
    run: Annotated[str, typer.Argument(metavar="RUN", help="MLflow run id; `convoy runs` lists them.")],
    ranks: Annotated[
        int | None,
        typer.Option(
            help="Processes; the result does not depend on it. Default: as the run began, or one per GPU or core."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        set_option("Change a key that does not affect the result."),
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


def _run_with_summary(run: Callable[[], Summary], file: Path | None, dataset: str | None = None) -> None:
    """Runs a flow and writes its summary to a file, also when it fails."""
    if file:
        check_writable(file, "--summary", replaced=False)
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
