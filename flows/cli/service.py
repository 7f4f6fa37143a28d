"""Commands of a retraining service: `deploy`, `worker`, `join`, `retrain`, `cancel`, `notify-data`."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.console import loading, print_line, print_pairs, servers_up
from flows.summary import check_writable, write_report
from infra.errors import UsageError
from infra.settings import Settings

WORKER_POLL_SECONDS = "2"  # between a worker's polls for flow runs; Prefect's default is 10
DEPLOYMENTS = Path(__file__).parents[2] / "infra" / "prefect.yaml"


def deploy(
    file: Annotated[Path, typer.Option("--file", "-f", help="Prefect's deployment file.")] = DEPLOYMENTS,
) -> None:
    """Register the deployments of a file with Prefect, with their schedules and triggers.

    A second call changes nothing. A schedule whose slug is no longer in the file is deleted. `convoy worker` then runs
    flow runs that are due.
    """
    servers_up(only=["prefect"])
    with loading():
        from flows.deployments import deploy as register

    for deployment in register(file):
        print_line(deployment)


def worker(
    limit: Annotated[int, typer.Option(min=1, help="Flow runs at the same time.")] = 1,
    pool: Annotated[str, typer.Option(help="Work pool, of type process.")] = "convoy",
) -> None:
    """Run the flow runs of deployments on this machine, until stopped.

    First it cleans up after an earlier worker, as `convoy doctor --fix` does.
    """
    servers_up()
    with loading():
        from flows.deployments import ensure_pool
        from tasks.upkeep.doctor import settle_all

    ensure_pool(pool)
    for finding in settle_all():
        print_line(f"settled: {finding}")
    os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "INFO"  # a worker's output is its log
    os.environ.setdefault("PREFECT_WORKER_QUERY_SECONDS", WORKER_POLL_SECONDS)
    command = ["-m", "prefect", "worker", "start", "--pool", pool, "--type", "process", "--limit", str(limit)]
    sys.stdout.flush()
    # At SIGTERM, Prefect's worker sends itself a SIGINT, which a script's background job ignores.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.execv(sys.executable, [sys.executable, *command])


def join(
    run: Annotated[str | None, typer.Argument(metavar="RUN", help="Join only this training, until it ends.")] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Most ranks on this machine. Default: one per GPU or core.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Address at which other nodes reach this one. Default: detected.")
    ] = None,
) -> None:
    """Lend this machine to trainings on several nodes (launcher=nodes), one after another, until stopped.

    It needs the storage (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, …) and the MLflow (MLFLOW_TRACKING_URI) of the machine
    that trains, the same Convoy, and a private network between the nodes: traffic between ranks is neither encrypted
    nor signed. After SIGTERM or Ctrl-C a training continues without this node.

    [dim]convoy train --set launcher=nodes --set nodes.min=2[/]   and, on another machine,   [dim]convoy join[/]
    """
    settings = Settings()
    if settings.s3_url is None or settings.mlflow_uri is None:
        from infra.stack import local_stack

        states = {server.state for server in local_stack.status(settings) if server.name != "prefect"}
        if states & {"stopped", "dead"}:
            raise UsageError(
                "set AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, CONVOY_BUCKET and MLFLOW_TRACKING_URI "
                "to the servers of the machine that trains"
            )
    servers_up(only=["seaweedfs", "mlflow"])
    os.environ |= {
        name: str(value) for name, value in {"CONVOY_SLOTS": ranks, "CONVOY_ADDRESS": address}.items() if value
    }
    os.environ["PYTHONSAFEPATH"] = "1"  # otherwise `-m` searches the user's folder first
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "tasks.training.nodes.agent", *([run] if run else [])])


def retrain(
    deployment: Annotated[
        str,
        typer.Option("--deployment", "-d", envvar="CONVOY_DEPLOYMENT", help="Name, as `convoy deploy` prints it."),
    ] = "retrain/fashion-mnist",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change a key for this run. Repeatable."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Train although nothing has changed.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end, and exit with its status.")] = False,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="With --wait: write a page (Markdown).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --wait: print the result as JSON.")] = False,
) -> None:
    """Ask a worker to retrain a model if data, code, configuration or lock file have changed since the champion.

    Works with any Prefect that PREFECT_API_URL names. With --wait, exit status 0 means promoted or nothing to do, 3
    that a gate refused.

    [dim]convoy retrain -d retrain/fashion-mnist --wait --report report.md[/]
    """
    if report:
        check_writable(report, "--report")
    servers_up(only=["prefect"])
    with loading():
        from flows.deployments import follow, start_retraining

    started = start_retraining(deployment, settings or [], force=force)
    print_line(f"flow run {started.url}", error=True)
    if not wait:
        if as_json:
            typer.echo(json.dumps({"prefect_flow_run_id": str(started.id), "prefect_flow_run_url": started.url}))
        return
    summary, pages = follow(started.id, lambda line: print_line(line, error=True))
    if report:
        write_report(report, summary, pages)
    if as_json:
        typer.echo(json.dumps(summary.as_dict(), indent=2))
    else:
        print_pairs({"status": summary.status, "why": summary.headline})
    if summary.exit_status:
        if summary.mlflow_run_id and summary.status != "refused":
            print_line(f"MLflow run {summary.mlflow_run_id}: `convoy resume` goes on with it", error=True)
        print_line(f"convoy: {summary.error}", error=True)
        raise typer.Exit(summary.exit_status)


def cancel(
    run: Annotated[str, typer.Argument(metavar="RUN", help="MLflow run id, or Prefect flow run id.")],
) -> None:
    """Cancel a training: its ranks store a checkpoint and end within seconds; `convoy resume` goes on with it."""
    servers_up()
    with loading():
        from flows.deployments import cancel as request_cancel

    print_line(request_cancel(run))


def notify_data(
    dataset: Annotated[str, typer.Argument(help="Name of the dataset, as in the deployments' triggers.")],
) -> None:
    """Announce new data: deployments with a trigger for the dataset start."""
    servers_up(only=["prefect"])
    with loading():
        from flows.deployments import emit_data_changed

    emit_data_changed(dataset)
    print_line(f"announced that {dataset} has changed")
