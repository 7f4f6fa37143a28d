"""Starts, follows and cancels flow runs of deployments, and announces data for which they start."""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar
from uuid import UUID, uuid4

import httpx
from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import DeploymentResponse, SetStateStatus
from prefect.client.schemas.sorting import ArtifactSort
from prefect.events import EventTrigger, Resource, ResourceSpecification, emit_event
from prefect.events.schemas.automations import Automation
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.states import Cancelling

from flows.deployments import job_variables, renamed_to
from flows.run_names import command_reason, model_name, with_name
from flows.summary import GOES_ON, REFUSED, Summary
from infra.errors import ServiceError, UsageError
from infra.records import Record
from infra.tracking.tags import EXIT_STATUS, FLOW_RUN, MLFLOW_RUN, RESUMED_BY, STARTED_BY
from tasks.config.deployment import CodeConfig
from tasks.config.run import RunConfig, load_config
from tasks.orchestration.flow_runs import PAGE, may_go_on, online_workers, page_of
from tasks.orchestration.outage import is_prefect_outage, through_outage

Answer = TypeVar("Answer")

MAX_POLL_SECONDS = 2.0  # between polls of a flow run
POLL_SHARE = 0.05  # of the time waited so far, as a pause before the next poll: short runs are polled often
MAX_OUTAGE_SECONDS = 1800.0  # that Prefect may be down while a command waits for a flow run
SUCCESSOR_SECONDS = 180.0  # that a command waits until a worker resumes a flow run; workers look every minute
NO_ANSWER = "Prefect does not answer"
NO_WORKER_SECONDS = 3.0  # that a flow run waits before a warning says that no worker is there
BUSY_WORKER_SECONDS = 30.0  # that it waits before a warning says that the workers have not taken it
DATA_CHANGED = "convoy.data.changed"
REPORT_ARTIFACTS = ("quality-gate", "evaluation")  # in the order of a report


class Started(Record):
    """A flow run that was requested."""

    id: UUID
    url: str


def start_retraining(
    deployment: str | None,
    settings: list[str],
    *,
    force: bool,
    config: RunConfig | None = None,
    code: CodeConfig | None = None,
) -> Started:
    """Starts a flow run of a `retrain` deployment.

    Args:
        deployment: its name, with or without the flow's name; None: that of the model of `config`.
        settings: `key=value` texts that change the deployment's configuration.
        config: takes the place of the deployment's configuration; the settings are in it already.
        code: the commit whose code the worker runs; None: as the deployment says.

    Raises:
        UsageError: there is no such deployment, or a setting cannot be used.
        ServiceError: Prefect refuses the run.
    """
    name = deployment or model_name(config or RunConfig())
    name = name if "/" in name else f"retrain/{name}"
    with get_client(sync_client=True) as client:
        found = find_deployment(client, name)
        if config is None:
            config = load_config(None, settings, base=found.parameters.get("config", {}))  # mistakes are reported here
        parameters = {"config": with_name(config).model_dump(mode="json", exclude_unset=True), "force": force}
        return start(client, found, parameters, code=code)


def start(
    client: SyncPrefectClient,
    deployment: DeploymentResponse,
    parameters: dict[str, Any],
    *,
    code: CodeConfig | None = None,
    labels: dict[str, str] | None = None,
) -> Started:
    """Starts a flow run of a deployment.

    Raises:
        ServiceError: Prefect refuses the run.
    """
    try:
        run = client.create_flow_run_from_deployment(
            deployment.id,
            parameters=parameters,
            idempotency_key=uuid4().hex,  # Prefect's client repeats a request whose answer was lost
            labels={STARTED_BY: command_reason(), **(labels or {})},
            job_variables=job_variables(code) if code else None,
        )
    except PrefectHTTPStatusError as error:
        raise ServiceError(f"Prefect refuses the run: {error.response.text[:300]}") from None
    return Started(id=run.id, url=page_of(run.id))


def find_deployment(client: SyncPrefectClient, name: str) -> DeploymentResponse:
    """Returns the deployment of that name; the one that replaces it, if it has been renamed since.

    Raises:
        UsageError: there is none.
    """
    try:
        found = client.read_deployment_by_name(name)
    except ObjectNotFound:
        known = ", ".join(sorted(each.name for each in client.read_deployments())) or "none; see `convoy deploy`"
        raise UsageError(f"Prefect has no deployment {name}; there are: {known}; --deployment names one") from None
    new_name = renamed_to(found.tags)
    return find_deployment(client, new_name) if new_name else found


def follow(flow_run_id: UUID, report: Callable[[str], None]) -> tuple[Summary, list[str]]:
    """Waits until a flow run has ended; returns its summary, and its pages for a report.

    Args:
        report: is called with one line at each change of the state.

    Raises:
        ServiceError: Prefect did not answer for `MAX_OUTAGE_SECONDS`.
    """
    shown: str | None = None
    began, warned = time.monotonic(), False

    def answer(ask: Callable[[], Answer]) -> Answer:
        """Returns what Prefect answers, through an outage."""

        def warn(_: str) -> None:
            nonlocal shown
            shown = None
            report(f"{NO_ANSWER}, which does not end the flow run: waiting for it")

        try:
            return through_outage(ask, warn, MAX_OUTAGE_SECONDS)
        except httpx.HTTPError as error:
            if not is_prefect_outage(error):
                raise
            raise ServiceError(f"{NO_ANSWER} ({error}); the flow run may go on without it") from None

    with get_client(sync_client=True) as client:
        while True:
            run = answer(partial(client.read_flow_run, flow_run_id))
            state = run.state
            if state and state.name != shown:
                shown = state.name
                report(f"{shown}{': ' + state.message if state.message else ''}")
            if state and state.is_final():
                run, successor = _successor(client, run, report)
                if successor is None:
                    break
                report(f"it goes on as flow run {page_of(successor)}")
                flow_run_id, shown, began = successor, None, time.monotonic()
                continue
            waited = time.monotonic() - began
            if not warned and run.start_time is None and waited > NO_WORKER_SECONDS:
                pool = run.work_pool_name or "convoy"
                if not answer(partial(online_workers, client, pool)):
                    report(f"no worker of the pool {pool} is online: `convoy worker --pool {pool}` starts one here")
                    warned = True
                elif waited > BUSY_WORKER_SECONDS:
                    report(f"the workers of the pool {pool} have not taken it yet: they may be busy")
                    warned = True
            time.sleep(min(MAX_POLL_SECONDS, 0.1 + POLL_SHARE * (time.monotonic() - began)))
        of_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
        artifacts = answer(partial(client.read_artifacts, artifact_filter=of_run, sort=ArtifactSort.CREATED_DESC))
    data = {artifact.key: artifact.data for artifact in reversed(artifacts)}  # of one key, the newest counts
    return _summary(run, data.get("summary")), [str(data[key]) for key in REPORT_ARTIFACTS if key in data]


def successor_of(run: FlowRun) -> UUID | None:
    """Returns the flow run that goes on with one that has died; None if none does."""
    try:
        return UUID(str(run.labels.get(RESUMED_BY)))
    except ValueError:  # the reason why nothing goes on
        return None


def _successor(client: SyncPrefectClient, run: FlowRun, report: Callable[[str], None]) -> tuple[FlowRun, UUID | None]:
    """Waits for the flow run that goes on with one that died.

    Returns:
        The flow run as it is now, and the other one; None if there is none, or no worker makes one in time.
    """
    deadline = time.monotonic() + SUCCESSOR_SECONDS
    if may_go_on(run):
        report(f"{run.state_name}: waiting until a worker resumes it")
    while may_go_on(run) and time.monotonic() < deadline:
        time.sleep(MAX_POLL_SECONDS)
        with suppress(httpx.HTTPError):
            run = client.read_flow_run(run.id)
    return run, successor_of(run)


def _summary(run: FlowRun, rows: Any) -> Summary:
    assert run.state is not None
    if rows and (run.state.type == StateType.COMPLETED or run.state.name == REFUSED):
        table = json.loads(rows) if isinstance(rows, str) else rows
        return Summary.model_validate({row["name"]: row["value"] for row in table})
    stopped = run.state.type in (StateType.CANCELLED, StateType.CANCELLING, StateType.PAUSED)
    interrupted, error = stopped or may_go_on(run), run.state.message or run.state.name
    return Summary(
        status="interrupted" if interrupted else "failed",
        error=f"{error}; {GOES_ON}" if may_go_on(run) else error,
        exit_status=75 if interrupted else int(run.labels.get(EXIT_STATUS, 1)),
        mlflow_run_id=run.labels.get(MLFLOW_RUN),
        prefect_flow_run_id=str(run.id),
        prefect_flow_run_url=page_of(run.id),
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
        while successor := successor_of(found):  # which may not have begun, so that MLflow does not name it yet
            found = client.read_flow_run(successor)
        return cancel_flow_run(client, found, "a person cancelled it")


def cancel_flow_run(client: SyncPrefectClient, found: FlowRun, why: str) -> str:
    """Does what `cancel` describes to a flow run.

    Args:
        why: what people read if it is dead, and no worker resumes it.
    """
    if may_go_on(found):
        client.update_flow_run_labels(found.id, {RESUMED_BY: f"none: {why}"})
        return f"flow run {found.name} is {found.state_name}, and no worker resumes it"
    if found.state and found.state.is_final():
        raise UsageError(f"flow run {found.name} has ended: {found.state.name}")
    wanted: State[None] = Cancelling(message=why)
    answer = client.set_flow_run_state(found.id, wanted)
    # Prefect answers with a rejection if it cancels a run at once, since no worker has taken it yet.
    if answer.status != SetStateStatus.ACCEPT and not (answer.state and answer.state.is_cancelled()):
        state = answer.state.name if answer.state else found.state_name
        reason = getattr(answer.details, "reason", None) or f"it is {state}"
        raise ServiceError(f"Prefect does not cancel flow run {found.name}: {reason}")
    return f"flow run {found.name} is being cancelled: {page_of(found.id)}"


def announce_data(dataset: str) -> list[str]:
    """Emits the event that deployments' triggers wait for.

    Returns:
        Names of the automations that it starts, those of the triggers among them.
    """
    resource = {"prefect.resource.id": f"convoy.dataset.{dataset}"}
    automations: list[Automation] = []
    with get_client(sync_client=True) as client:  # the event is sent in the background, where no error would be seen
        while page := client.read_automations(limit=PAGE, offset=len(automations)):
            automations += page
    emit_event(event=DATA_CHANGED, resource=resource)
    return [each.name for each in automations if each.enabled and _waits_for(each, Resource(resource))]


def _waits_for(automation: Automation, dataset: Resource) -> bool:
    trigger = automation.trigger
    return (
        isinstance(trigger, EventTrigger)
        and DATA_CHANGED in trigger.expect
        and isinstance(trigger.match, ResourceSpecification)
        and trigger.match.matches(dataset)
    )
