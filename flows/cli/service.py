"""Commands of a retraining service: `deploy`, `worker`, `join`, `retrain`, `trial`, `cancel`, `notify-data`."""

import os
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.console import (
    JsonOption,
    configuration_file,
    loading,
    print_json,
    print_line,
    print_pairs,
    servers_up,
)
from flows.cli.notify import set_up_notifications, webhook_of
from flows.cli.options import set_option
from flows.summary import GOES_ON, Summary, write_report
from infra.errors import ServiceError, UsageError, one_line
from infra.machine.checkouts import check_address
from infra.machine.files import check_writable
from infra.settings import Settings
from tasks.config.project import project_file

if TYPE_CHECKING:
    from tasks.config.deployment import ProjectConfig
    from tasks.config.run import RunConfig

WORKER_POLL_SECONDS = "2"  # between a worker's polls for flow runs; Prefect's default is 10
EXAMPLE_DEPLOYMENT = "retrain/fashion-mnist"


def deploy(
    read_config: "partial[ProjectConfig]",
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", help="Prefect's deployment file, instead of a configuration.", show_default=False),
    ] = None,
    schedules: Annotated[
        bool | None,
        typer.Option(
            "--schedules/--no-schedules",
            help="Switch all schedules on or off. Default: a schedule stays as it is; a new one is on, "
            "unless the file says `active: false`, as Convoy's own file does.",
        ),
    ] = None,
) -> None:
    """Register a deployment with Prefect that retrains by the configuration: convoy.yaml, --config, or other options.

    The section `deploy` of the file has schedule, retention and notifications. Without any configuration, the
    deployments of `infra/prefect.yaml`, or of --file, are registered.

    A second call changes nothing. A schedule that is no longer in the file is deleted. `convoy worker` then runs flow
    runs that are due.

    [dim]convoy deploy[/]   in a folder with a convoy.yaml, which `convoy init` writes
    [dim]convoy deploy --file deployments.yaml --schedules[/]
    """
    given = any(value is not None and value != [] for value in read_config.keywords.values())
    if file is not None and given:
        raise UsageError("--file and the options of a configuration exclude each other")
    project = read_config() if file is None and (given or project_file()) else None
    notification = project and project.deploy.notification
    webhook = webhook_of(notification) if notification else None  # a missing one is reported before servers start
    with loading():
        from flows.deployments import DEPLOYMENTS, deploy_project
        from flows.deployments import deploy as deploy_file

    # A faulty file is reported before servers start.
    registering = deploy_project(project, schedules) if project else deploy_file(file or DEPLOYMENTS, schedules)
    servers_up(only=["prefect"])
    lines = list(registering)
    for line in lines:
        print_line(line)
    if notification and webhook:
        print_line(f"messages: {', '.join(set_up_notifications(webhook, notification))}")
    if any("(off)" in line for line in lines):
        again = f" --file {shlex.quote(str(file))}" if file else ""
        print_line(
            f"Schedules that are off start nothing; `convoy deploy{again} --schedules` switches them on.", error=True
        )


def worker(
    limit: Annotated[int, typer.Option(min=1, help="Flow runs at the same time.")] = 1,
    pool: Annotated[str, typer.Option(help="Work pool, of type process.")] = "convoy",
) -> None:
    """Run the flow runs of deployments on this machine, until stopped.

    Their relative paths, and networks of your own, are those of the folder in which this is called.

    First it cleans up after an earlier worker, as `convoy doctor --fix` does.

    Trainings of deployments that die on any machine go on by themselves, on the next free worker with the same code,
    libraries and kind of processor. After SIGTERM or Ctrl-C, running trainings store a checkpoint and go on elsewhere,
    or when a worker starts again.
    """
    servers_up()
    with loading():
        from flows.deployments import ensure_pool, queues_to_serve
        from tasks.training.platform import this_platform
        from tasks.upkeep.doctor import settle_all

        platform = this_platform()
    ensure_pool(pool)
    queues = queues_to_serve(pool, platform)
    try:
        for finding in settle_all():
            print_line(f"settled: {finding}")
    except ServiceError as error:  # for example since this worker may not write to the registry
        print_line(f"cannot clean up: {one_line(error)}", error=True)
    os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "INFO"  # a worker's output is its log
    os.environ.setdefault("CONVOY_PROJECT", os.getcwd())
    os.environ["PYTHONSAFEPATH"] = "1"  # otherwise `-m` searches the user's folder first, here and in flow runs
    os.environ.setdefault("PREFECT_WORKER_QUERY_SECONDS", WORKER_POLL_SECONDS)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "flows.worker", pool, str(limit), *queues])


def join(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN",
            help="Join only this training; end with it, or if it invites no node for ten minutes.",
        ),
    ] = None,
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


DeploymentOption = Annotated[
    str | None,
    typer.Option(
        "--deployment",
        "-d",
        envvar="CONVOY_DEPLOYMENT",
        help=f"Name, as `convoy deploy` prints it. Default: that of the project, or {EXAMPLE_DEPLOYMENT}.",
    ),
]
FileOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        help="YAML file of keys, in place of the deployment's. Default: convoy.yaml, unless --deployment is given.",
    ),
]
SettingsOption = Annotated[
    list[str] | None,
    set_option("Change a key for this run. Repeatable."),
]
RepositoryOption = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="The git repository of the commit. Default: that of the worker's folder."),
]


def retrain(
    deployment: DeploymentOption = None,
    config_file: FileOption = None,
    settings: SettingsOption = None,
    commit: Annotated[
        str | None,
        typer.Option(
            metavar="REF", help="Train with the code of this commit, branch or tag, and the packages of its lock file."
        ),
    ] = None,
    repository: RepositoryOption = None,
    force: Annotated[bool, typer.Option("--force", help="Train although nothing has changed.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end, and exit with its status.")] = False,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="With --wait: write a page (Markdown).")] = None,
    as_json: JsonOption = False,
) -> None:
    """Ask a worker to retrain a model if data, code, configuration or lock file have changed since the champion.

    Works with any Prefect that PREFECT_API_URL names. With --wait, exit status 0 means promoted or nothing to do, 3
    that a gate refused.

    [dim]convoy retrain -d retrain/fashion-mnist --wait --report report.md[/]
    [dim]convoy retrain --commit $(git rev-parse HEAD) --repository https://example.org/team/project.git[/]
    """
    if repository and not commit:
        raise UsageError("--repository needs --commit")
    if report and not wait:
        raise UsageError("--report needs --wait: there is nothing to report before the end")
    config = _given_config(deployment, config_file, settings, repository, report)
    servers_up(only=["prefect"])
    with loading():
        from flows.deployed_runs import follow, start_retraining
        from tasks.config.deployment import CodeConfig

    code = CodeConfig(repository=repository, ref=commit) if commit else None
    name = deployment or (None if config else EXAMPLE_DEPLOYMENT)
    started = start_retraining(name, settings or [], force=force, config=config, code=code)
    print_line(f"flow run {started.url}", error=True)
    if not wait:
        if as_json:
            print_json({"prefect_flow_run_id": started.id, "prefect_flow_run_url": started.url})
        return
    _show_result(*follow(started.id, partial(print_line, error=True)), report, as_json=as_json)


def trial(
    commit: Annotated[str, typer.Argument(metavar="REF", help="Commit, branch or tag.")],
    deployment: DeploymentOption = None,
    config_file: FileOption = None,
    settings: SettingsOption = None,
    repository: RepositoryOption = None,
    key: Annotated[
        str | None,
        typer.Option(
            help="Name of what it is tried for, such as pull-12; unfinished trials of other commits with this key end."
        ),
    ] = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page (Markdown).")] = None,
    as_json: JsonOption = False,
) -> None:
    """Ask workers what a commit would do to the model, and wait: nothing is registered, and the champion stays.

    The commit's code trains and evaluates in a work pool of its own (`deploy.trial_pool`). The installed code judges
    the result as if it were a new version; exit status 3 means that the gate would refuse it.

    [dim]convoy trial $(git rev-parse HEAD) -d retrain/fashion-mnist --report report.md[/]
    """
    config = _given_config(deployment, config_file, settings, repository, report)
    servers_up(only=["prefect"])
    with loading():
        from flows.trial_request import try_commit
        from tasks.config.deployment import CodeConfig

    code = CodeConfig(repository=repository, ref=commit)
    name = deployment or (None if config else EXAMPLE_DEPLOYMENT)
    done = try_commit(name, settings or [], code, config=config, key=key, report=partial(print_line, error=True))
    _show_result(*done, report, as_json=as_json)


def _given_config(
    deployment: str | None,
    file: Path | None,
    settings: list[str] | None,
    repository: str | None,
    report: Path | None,
) -> "RunConfig | None":
    """Returns the configuration that takes the place of the deployment's, if there is one; first checks the options."""
    if repository:
        check_address(repository)
    if report:
        check_writable(report, "--report", replaced=False)
    found = configuration_file(file) if deployment is None else file
    if not found:
        return None
    from tasks.config.deployment import load_project

    return load_project(found, settings or []).run


def _show_result(summary: Summary, pages: Sequence[str], report: Path | None, *, as_json: bool) -> None:
    """Prints the result of a flow run that was waited for; exits with its status unless that is 0."""
    if report:
        write_report(report, summary, pages)
    if as_json:
        print_json(summary.as_dict())
    else:
        print_pairs({"status": summary.status, "why": summary.headline})
    if summary.exit_status:
        goes_on = (summary.error or "").endswith(GOES_ON)
        if summary.mlflow_run_id and summary.status != "refused" and not summary.trial and not goes_on:
            print_line(f"MLflow run {summary.mlflow_run_id}: `convoy resume` goes on with it", error=True)
        print_line(f"convoy: {summary.error}", error=True)
        raise typer.Exit(summary.exit_status)


def cancel(
    run: Annotated[str, typer.Argument(metavar="RUN", help="MLflow run id, or Prefect flow run id.")],
) -> None:
    """Cancel a training: its ranks store a checkpoint and end within seconds; `convoy resume` goes on with it."""
    servers_up()
    with loading():
        from flows.deployed_runs import cancel as request_cancel

    print_line(request_cancel(run))


def notify_data(
    dataset: Annotated[
        str,
        typer.Argument(
            help="Name for which the deployments' triggers wait: a dataset's, or for a project its model's."
        ),
    ],
) -> None:
    """Announce new data: deployments with a trigger for the dataset start."""
    servers_up(only=["prefect"])
    with loading():
        from flows.deployed_runs import announce_data

    started = announce_data(dataset)
    print_line(f"announced that {dataset} has changed")
    for automation in started:
        print_line(f"starts: {automation}")
    if not started:
        print_line(f"nothing waits for it: no deployment in Prefect has a trigger for {dataset!r}", error=True)
