"""Commands of a service: `deploy`, `worker`, `retrain`, `cancel`, `notify-data`."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.console import loading, print_pairs, say, servers_up
from flows.summary import check_writable, write_report
from infra.errors import UsageError
from infra.settings import Settings

LOOK_EVERY = "2"  # seconds between a worker's looks for runs; Prefect's default is 10
DEPLOYMENTS = Path(__file__).parents[2] / "infra" / "prefect.yaml"


def deploy(
    file: Annotated[Path, typer.Option("--file", "-f", help="Prefect's deployment file.")] = DEPLOYMENTS,
) -> None:
    """Register the deployments of a file with Prefect, with their schedules and triggers.

    Doing it again changes nothing. A schedule that has left the file is deleted, by its slug. `convoy worker` then runs
    what is due.
    """
    servers_up(only=["prefect"])
    with loading():
        from flows.deployments import deploy as register

    for deployment in register(file):
        say(deployment)


def worker(
    limit: Annotated[int, typer.Option(min=1, help="Flow runs at once.")] = 1,
    pool: Annotated[str, typer.Option(help="Work pool, of type process.")] = "convoy",
) -> None:
    """Run what deployments ask for, on this machine, until stopped.

    First it settles what an earlier worker has left behind, as `convoy doctor --fix` does.
    """
    servers_up()
    with loading():
        from flows.deployments import ensure_pool
        from tasks.upkeep.doctor import settle_all

    ensure_pool(pool)
    for finding in settle_all():
        say(f"settled: {finding}")
    os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "INFO"  # this process is for reading its log
    os.environ.setdefault("PREFECT_WORKER_QUERY_SECONDS", LOOK_EVERY)
    command = ["-m", "prefect", "worker", "start", "--pool", pool, "--type", "process", "--limit", str(limit)]
    sys.stdout.flush()
    # At SIGTERM, Prefect's worker sends itself a SIGINT, which a script's background job ignores.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.execv(sys.executable, [sys.executable, *command])


def join(
    run: Annotated[str | None, typer.Argument(metavar="RUN", help="Only in this training, until it is over.")] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Ranks here at most. Default: one a GPU, or core.")] = None,
    address: Annotated[str | None, typer.Option(help="Where other nodes reach this one. Default: looked up.")] = None,
) -> None:
    """Lend this machine to trainings on several nodes (launcher=nodes), one after another, until stopped.

    It needs the storage (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, …) and the MLflow
    (MLFLOW_TRACKING_URI) of the machine that trains, the same Convoy, and a network between
    the nodes that nobody else is in: what ranks say to each other is neither encrypted nor
    signed. SIGTERM or Ctrl-C has a training go on without this node.

    [dim]convoy train --set launcher=nodes --set nodes.min=2[/]   and, on another machine,   [dim]convoy join[/]
    """
    settings = Settings()
    if settings.s3_url is None or settings.mlflow_uri is None:
        from infra.stack import local_stack

        if any(
            server.state in ("stopped", "dead") for server in local_stack.status(settings) if server.name != "prefect"
        ):
            raise UsageError(
                "set AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, CONVOY_BUCKET and MLFLOW_TRACKING_URI "
                "to the servers of the machine that trains"
            )
    servers_up(only=["seaweedfs", "mlflow"])
    os.environ |= {
        name: str(value) for name, value in {"CONVOY_SLOTS": ranks, "CONVOY_ADDRESS": address}.items() if value
    }
    os.environ["PYTHONSAFEPATH"] = "1"  # else `-m` looks for our modules in the user's folder first
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "tasks.training.nodes.agent", *([run] if run else [])])


def retrain(
    deployment: Annotated[
        str,
        typer.Option(
            "--deployment", "-d", envvar="CONVOY_DEPLOYMENT", help="Which one, as `convoy deploy` lists them."
        ),
    ] = "retrain/fashion-mnist",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="KEY=VALUE", help="Another configuration for this run. Repeatable."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Train although nothing has changed.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Until it has ended, and exit as it did.")] = False,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="With --wait: a page about it, Markdown.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --wait: the result on standard output.")] = False,
) -> None:
    """Ask a worker to retrain a model, if its data, code, configuration or lock file have changed since the champion.

    Works against any Prefect that PREFECT_API_URL names. With --wait, exit status 0 means promoted or nothing to do,
    3 that a gate refused.

    [dim]convoy retrain -d retrain/fashion-mnist --wait --report report.md[/]
    """
    if report:
        check_writable(report, "--report")
    servers_up(only=["prefect"])
    with loading():
        from flows.deployments import follow, start_retraining

    started = start_retraining(deployment, settings or [], force=force)
    say(f"flow run {started.url}", error=True)
    if not wait:
        if as_json:
            typer.echo(json.dumps({"prefect_flow_run_id": str(started.id), "prefect_flow_run_url": started.url}))
        return
    summary, pages = follow(started.id, lambda line: say(line, error=True))
    if report:
        write_report(report, summary, pages)
    if as_json:
        typer.echo(json.dumps(summary.as_dict(), indent=2))
    else:
        print_pairs({"status": summary.status, "why": summary.headline})
    if summary.exit_status:
        if summary.mlflow_run_id and summary.status != "refused":
            say(f"MLflow run {summary.mlflow_run_id}: `convoy resume` goes on with it", error=True)
        say(f"convoy: {summary.error}", error=True)
        raise typer.Exit(summary.exit_status)


def cancel(
    run: Annotated[str, typer.Argument(metavar="RUN", help="MLflow run id, or Prefect flow run id.")],
) -> None:
    """Cancel a training: its ranks store a checkpoint and end within seconds; `convoy resume` goes on."""
    servers_up()
    with loading():
        from flows.deployments import cancel as ask

    say(ask(run))


def notify_data(
    dataset: Annotated[str, typer.Argument(help="Name of the dataset, as in the deployments' triggers.")],
) -> None:
    """Say that there are new data: deployments with a trigger for it start."""
    servers_up(only=["prefect"])
    with loading():
        from flows.deployments import data_changed

    data_changed(dataset)
    say(f"said that {dataset} has changed")
