"""Registers deployments with Prefect from a file, starts their flow runs, follows and cancels them."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import yaml
from prefect import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import SetStateStatus
from prefect.events import emit_event
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.states import Cancelling
from prefect.utilities.urls import url_for

from flows.summary import Summary
from infra.errors import ServiceError, UsageError, one_line
from infra.records import Record
from infra.tracking.tags import FLOW_RUN, MLFLOW_RUN
from tasks.config.run import load_config

MAX_POLL_SECONDS = 2.0  # between polls of a flow run
POLL_SHARE = 0.05  # of the time waited so far, as a pause before the next poll: short runs are polled often
MAX_OUTAGE_SECONDS = 1800.0  # that Prefect may be down while a command waits for a flow run
NO_ANSWER = "Prefect does not answer"
UNTAKEN_WARNING_SECONDS = 30.0  # after which a warning says that no worker has taken a flow run
DATA_CHANGED = "convoy.data.changed"
REPORT_ARTIFACTS = ("quality-gate", "evaluation")  # in the order of a report
PREFECT_PROGRAM = (
    "import cnn, infra, tasks, flows, runpy; runpy.run_module('prefect', run_name='__main__', alter_sys=True)"
)
"""Prefect's command line with Convoy's packages loaded: Prefect searches the working folder first, which may hold other
packages of these names."""


class Started(Record):
    """A flow run that was requested."""

    id: UUID
    url: str


def deploy(file: Path) -> Iterator[str]:
    """Registers all deployments of a file in Prefect's format; yields one line per deployment.

    Raises:
        UsageError: the file cannot be used.
        ServiceError: Prefect refuses.
    """
    entries = _entries(file)
    for pool in sorted({entry["work_pool"]["name"] for entry in entries}):
        ensure_pool(pool)
    command = [sys.executable, "-c", PREFECT_PROGRAM, "--no-prompt", "deploy", "--all", "--prefect-file", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        output = one_line(done.stderr or done.stdout)
        raise ServiceError(f"Prefect did not register the deployments of {file}: {output[-400:]}")
    with get_client(sync_client=True) as client:
        for entry in entries:
            flow_name = flow_of(entry["entrypoint"]).name
            found = client.read_deployment_by_name(f"{flow_name}/{entry['name']}")
            schedules = entry.get("schedules", [])
            wanted = {schedule.get("slug") for schedule in schedules}
            for schedule in found.schedules:
                if schedule.slug not in wanted:
                    client.delete_deployment_schedule(found.id, schedule.id)
            when = ", ".join(f"{each['cron']} {each.get('timezone', 'UTC')}" for each in schedules if "cron" in each)
            yield f"{flow_name}/{found.name}" + (f"  at {when}" if when else "")


def ensure_pool(name: str) -> None:
    """Creates a work pool of type process if there is none of that name."""
    with get_client(sync_client=True) as client:
        try:
            client.read_work_pool(name)
        except ObjectNotFound:
            client.create_work_pool(WorkPoolCreate(name=name, type="process"))


def _entries(file: Path) -> list[dict[str, Any]]:
    try:
        entries = yaml.safe_load(file.read_text())["deployments"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UsageError(f"{file} is no file of deployments: {one_line(error)}") from None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UsageError(f"{file}: `deployments` must be a list, each with name, entrypoint and work_pool")
    for entry in entries:
        if missing := {"name", "entrypoint", "work_pool"} - entry.keys():
            raise UsageError(f"{file}: a deployment lacks {', '.join(sorted(missing))}")
        if any("slug" not in schedule for schedule in entry.get("schedules", [])):
            raise UsageError(f"{file}: every schedule of {entry['name']} needs a slug, which identifies it")
    return entries


def flow_of(entrypoint: str) -> Flow[..., Any]:
    """Returns the flow at an entrypoint such as `flows.train.train_flow`."""
    return load_flow_from_entrypoint(entrypoint)


def start_retraining(deployment: str, settings: list[str], *, force: bool) -> Started:
    """Starts a flow run of a `retrain` deployment.

    Args:
        deployment: its name, with or without the flow's name.
        settings: `key=value` texts that change the deployment's configuration.

    Raises:
        UsageError: there is no such deployment, or a setting cannot be used.
        ServiceError: Prefect refuses the run.
    """
    name = deployment if "/" in deployment else f"retrain/{deployment}"
    with get_client(sync_client=True) as client:
        try:
            found = client.read_deployment_by_name(name)
        except ObjectNotFound:
            known = ", ".join(sorted(each.name for each in client.read_deployments())) or "none; see `convoy deploy`"
            raise UsageError(f"Prefect has no deployment {name}; there are: {known}") from None
        config = load_config(None, settings, base=found.parameters.get("config", {}))  # mistakes are reported here
        parameters = {"config": config.model_dump(mode="json", exclude_unset=True), "force": force}
        try:
            run = client.create_flow_run_from_deployment(found.id, parameters=parameters)
        except PrefectHTTPStatusError as error:
            raise ServiceError(f"Prefect refuses the run: {error.response.text[:300]}") from None
    return Started(id=run.id, url=url_for("flow-run", obj_id=run.id) or str(run.id))


def follow(flow_run_id: UUID, report: Callable[[str], None]) -> tuple[Summary, list[str]]:
    """Waits until a flow run has ended; returns its summary, and its pages for a report.

    Args:
        report: is called with one line at each change of the state.

    Raises:
        ServiceError: Prefect did not answer for `MAX_OUTAGE_SECONDS`.
    """
    shown: str | None = None
    down_since: float | None = None
    began, warned = time.monotonic(), False
    with get_client(sync_client=True) as client:
        while True:
            try:
                run = client.read_flow_run(flow_run_id)
            except httpx.HTTPError as error:
                if not _is_outage(error):
                    raise
                down_since = down_since or time.monotonic()
                if time.monotonic() - down_since > MAX_OUTAGE_SECONDS:
                    raise ServiceError(f"{NO_ANSWER} ({error}); the flow run may go on without it") from None
                if shown != NO_ANSWER:
                    shown = NO_ANSWER
                    report(f"{NO_ANSWER}, which does not end the flow run: waiting for it")
                time.sleep(MAX_POLL_SECONDS)
                continue
            down_since = None
            state = run.state
            if state and state.name != shown:
                shown = state.name
                report(f"{shown}{': ' + state.message if state.message else ''}")
            if state and state.is_final():
                break
            if not warned and run.start_time is None and time.monotonic() - began > UNTAKEN_WARNING_SECONDS:
                report("no worker has taken it yet: is a `convoy worker` running?")
                warned = True
            time.sleep(min(MAX_POLL_SECONDS, 0.1 + POLL_SHARE * (time.monotonic() - began)))
        artifacts = client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
        )
    data = {artifact.key: artifact.data for artifact in artifacts}
    return _summary(run, data.get("summary")), [str(data[key]) for key in REPORT_ARTIFACTS if key in data]


def _is_outage(error: httpx.HTTPError) -> bool:
    """Returns whether an error means that Prefect, or the network in between, is down or overloaded."""
    return not isinstance(error, httpx.HTTPStatusError) or error.response.status_code in (408, 429, *range(500, 600))


def _summary(run: FlowRun, rows: Any) -> Summary:
    assert run.state is not None
    if run.state.type == StateType.COMPLETED and rows:
        table = json.loads(rows) if isinstance(rows, str) else rows
        return Summary.model_validate({row["name"]: row["value"] for row in table})
    interrupted = run.state.type in (StateType.CANCELLED, StateType.CANCELLING, StateType.PAUSED)
    return Summary(
        status="interrupted" if interrupted else "failed",
        error=run.state.message or run.state.name,
        exit_status=75 if interrupted else 1,
        mlflow_run_id=run.labels.get(MLFLOW_RUN),
        prefect_flow_run_id=str(run.id),
        prefect_flow_run_url=url_for("flow-run", obj_id=run.id),
    )


def cancel(run: str) -> str:
    """Asks Prefect to cancel a training; returns a line to print.

    Args:
        run: id of an MLflow run or of a flow run.

    Raises:
        UsageError: there is no such run, or it has ended.
        ServiceError: Prefect refuses.
    """
    from infra.tracking import mlflow_runs  # here, since it loads MLflow, which the other commands do not need

    flow_run_id = mlflow_runs.run_tags(run).get(FLOW_RUN, run)
    with get_client(sync_client=True) as client:
        try:
            found = client.read_flow_run(UUID(flow_run_id))
        except (ObjectNotFound, ValueError):
            raise UsageError(f"{run} is neither a training in MLflow nor a flow run; see `convoy runs`") from None
        if found.state and found.state.is_final():
            raise UsageError(f"flow run {found.name} has ended: {found.state.name}")
        wanted: State[None] = Cancelling()
        answer = client.set_flow_run_state(found.id, wanted)
    if answer.status != SetStateStatus.ACCEPT:
        state = answer.state.name if answer.state else found.state_name
        reason = getattr(answer.details, "reason", None) or f"it is {state}"
        raise ServiceError(f"Prefect does not cancel flow run {found.name}: {reason}")
    return f"flow run {found.name} is being cancelled: {url_for('flow-run', obj_id=found.id)}"


def emit_data_changed(dataset: str) -> None:
    """Emits the event that deployments' triggers wait for."""
    with get_client(sync_client=True) as client:
        client.hello()  # events are sent in the background, where a refusal would not be noticed
    emit_event(event=DATA_CHANGED, resource={"prefect.resource.id": f"convoy.dataset.{dataset}"})
