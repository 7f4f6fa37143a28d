"""Registers deployments with Prefect from a file, starts their flow runs, follows and cancels them."""

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID, uuid4

import httpx
import yaml
from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentUpdate, WorkPoolCreate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import DeploymentResponse, SetStateStatus
from prefect.client.schemas.sorting import ArtifactSort
from prefect.events import EventTrigger, Resource, ResourceSpecification, emit_event
from prefect.events.schemas.automations import Automation
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound, PrefectHTTPStatusError
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.states import Cancelling
from prefect.utilities.urls import url_for

from flows.at_commit import COMMAND, REPOSITORY_VARIABLE
from flows.run_names import command_reason, model_name
from flows.summary import GOES_ON, REFUSED, Summary
from infra.errors import ServiceError, UsageError, one_line
from infra.records import Record
from infra.tracking.provenance import COMMIT_VARIABLE
from infra.tracking.tags import FLOW_RUN, MLFLOW_RUN, RESUMED_BY, STARTED_BY
from tasks.config.deployment import CodeConfig, ProjectConfig, ScheduleConfig
from tasks.config.run import RunConfig, load_config
from tasks.orchestration.flow_runs import PAGE, may_go_on, online_workers
from tasks.orchestration.outage import is_prefect_outage, through_outage

if TYPE_CHECKING:
    from tasks.training.platform import Platform

Answer = TypeVar("Answer")

DEPLOYMENTS = Path(__file__).parents[1] / "infra" / "prefect.yaml"
EXAMPLE = "fashion-mnist"
"""The name in that file of the deployments that are copied for a project, with another name."""

RETRAIN, PRUNE = "flows.retrain.retrain_flow", "flows.prune.prune_flow"

MAX_POLL_SECONDS = 2.0  # between polls of a flow run
POLL_SHARE = 0.05  # of the time waited so far, as a pause before the next poll: short runs are polled often
MAX_OUTAGE_SECONDS = 1800.0  # that Prefect may be down while a command waits for a flow run
SUCCESSOR_SECONDS = 180.0  # that a command waits until a worker resumes a flow run; workers look every minute
NO_ANSWER = "Prefect does not answer"
NO_WORKER_SECONDS = 3.0  # that a flow run waits before a warning says that no worker is there
BUSY_WORKER_SECONDS = 30.0  # that it waits before a warning says that the workers have not taken it
MADE_BY_CONVOY = "convoy"
"""Tag of the deployments in Convoy's own file, and in copies of it."""

RENAMED = "renamed:"
"""Prefix of the tag of a deployment that has another name now, which follows."""

POOL_DESCRIPTION = "Flow runs that are due, and wait for a machine on which `convoy worker` runs."
PLATFORM_QUEUE, PLATFORM_DIGITS = "platform-", 8
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


def deploy(file: Path, switch: bool | None = None) -> Iterator[str]:
    """Registers all deployments of a file in Prefect's format; see `_deploy`.

    Raises:
        UsageError: the file cannot be used.
    """
    project = _read(file)
    yield from _deploy(project, project["deployments"], switch)


def deploy_project(project: ProjectConfig, switch: bool | None = None) -> Iterator[str]:
    """Registers the deployments of a project; see `_deploy`.

    They are made of Convoy's own file, with the configuration as it is now: `retrain/NAME`, and `prune/storage` if the
    project says what to keep.
    """
    yield from _deploy({"name": "convoy", "pull": []}, list(_project_entries(project)), switch)


def _project_entries(project: ProjectConfig) -> Iterator[dict[str, Any]]:
    name, deploy = model_name(project), project.deploy
    text = json.dumps(_read(DEPLOYMENTS)["deployments"]).replace(EXAMPLE, json.dumps(name)[1:-1])
    example = {entry["entrypoint"]: entry for entry in json.loads(text)}
    pool: dict[str, Any] = {"name": deploy.pool}

    def entry(flow: str, schedule: ScheduleConfig | None, parameters: dict[str, Any], **changes: Any) -> dict[str, Any]:
        when = []
        if schedule and schedule.cron:
            slug = example[flow]["schedules"][0]["slug"]
            when = [{"slug": slug, "cron": schedule.cron, "timezone": schedule.timezone}]
        return {**example[flow], "parameters": parameters, "schedules": when, "work_pool": pool, **changes}

    triggers = example[RETRAIN]["triggers"] if deploy.new_data else []
    older = {"older_names": list(deploy.older_names), "triggers": triggers}
    config = project.run.model_dump(mode="json", exclude_unset=True)
    with_code = {"work_pool": pool | {"job_variables": job_variables(deploy.code)}} if deploy.code.ref else {}
    yield entry(RETRAIN, deploy.schedule, {"config": config}, **older, **with_code)
    if deploy.trial_pool:
        for flow, its_pool in (("trial", deploy.trial_pool), ("judge", deploy.pool)):
            earlier = [f"{name}-{flow}" for name in deploy.older_names]
            changes = {"older_names": earlier, "work_pool": {"name": its_pool}}
            yield entry(f"flows.trial.{flow}_flow", None, {"config": config}, **changes)
    if deploy.prunes:
        retention = deploy.retention.model_dump(mode="json", exclude_unset=True)
        yield entry(PRUNE, deploy.prune, {"retention": retention})


def _deploy(project: dict[str, Any], entries: list[dict[str, Any]], switch: bool | None) -> Iterator[str]:
    """Registers deployments, described in Prefect's format; yields one line per deployment.

    A schedule or trigger that Prefect has already, also under an older name of its deployment, stays on or off. A new
    one is on, unless the file says `active: false` (`enabled: false` of a trigger).

    Args:
        project: what a file in Prefect's format says beside its deployments.
        entries: the deployments; they get the state of their schedules.
        switch: switches all of their schedules on or off, but no triggers.

    Raises:
        ServiceError: Prefect refuses.
    """
    for pool in sorted({entry["work_pool"]["name"] for entry in entries}):
        ensure_pool(pool)
    names = [
        [f"{flow_of(entry['entrypoint']).name}/{name}" for name in (entry["name"], *entry.get("older_names", ()))]
        for entry in entries
    ]
    before, retired = _states(chain(*names))
    for known, entry in zip(names, entries, strict=True):
        states = dict[tuple[str, str | None], bool]()
        for name in reversed(sorted(known, key=retired.__contains__)):  # the last one decides: by its present name
            states |= before.get(name, {})
        if "schedules" in entry:
            entry["schedules"] = [
                each
                | {
                    "active": states.get(("schedule", each["slug"]), each.get("active", True))
                    if switch is None
                    else switch
                }
                for each in entry["schedules"]
            ]
        if "triggers" in entry:
            named = [
                {"name": f"{entry['name']}__automation_{number}", **each}  # Prefect's name for a trigger without one
                for number, each in enumerate(entry["triggers"], start=1)
            ]
            entry["triggers"] = [
                each | {"enabled": states.get(("trigger", each["name"]), each.get("enabled", True))} for each in named
            ]
    with NamedTemporaryFile("w", prefix="convoy-", suffix=".yaml") as file:
        yaml.safe_dump({**project, "deployments": entries}, file)
        file.flush()
        command = ["-P", "-c", PREFECT_PROGRAM, "--no-prompt", "deploy", "--all", "--prefect-file", file.name]
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        output = one_line(done.stderr or done.stdout)
        raise ServiceError(f"Prefect did not register the deployments: {output[-400:]}")
    with get_client(sync_client=True) as client:
        for (name, *older), entry in zip(names, entries, strict=True):
            found = client.read_deployment_by_name(name)
            schedules = {schedule["slug"]: schedule for schedule in entry.get("schedules", [])}
            for schedule in found.schedules:
                if schedule.slug not in schedules:
                    client.delete_deployment_schedule(found.id, schedule.id)
            when = ", ".join(
                f"{each['cron']} {each.get('timezone', 'UTC')} ({'on' if each['active'] else 'off'})"
                for each in schedules.values()
                if "cron" in each
            )
            yield name + (f"  at {when}" if when else "")
            for old_name in older:
                if _retire(client, old_name, name):
                    yield f"{old_name}  is now {name}; its schedules and triggers are off"


def _states(names: Iterable[str]) -> tuple[dict[str, dict[tuple[str, str | None], bool]], set[str]]:
    """Returns whether each schedule and each trigger is on, by its deployment's name, and its own slug or name.

    Also returns which of the deployments have another name now; `_retire` has switched their schedules off.
    """
    found, retired = dict[str, dict[tuple[str, str | None], bool]](), set[str]()
    with get_client(sync_client=True) as client:
        for name in names:
            with suppress(ObjectNotFound):
                deployment = client.read_deployment_by_name(name)
                triggers = client.read_resource_related_automations(f"prefect.deployment.{deployment.id}")
                found[name] = {("schedule", schedule.slug): schedule.active for schedule in deployment.schedules}
                found[name] |= {("trigger", trigger.name): trigger.enabled for trigger in triggers}
                if any(tag.startswith(RENAMED) for tag in deployment.tags):
                    retired.add(name)
    return found, retired


def _retire(client: SyncPrefectClient, old_name: str, new_name: str) -> bool:
    """Switches off schedules and triggers of a deployment that now has another name; returns whether it had to.

    The deployment remains, since scripts may start flow runs by its name. A deployment without the tag `convoy` is not
    one of Convoy's, and stays as it is.
    """
    try:
        found = client.read_deployment_by_name(old_name)
    except ObjectNotFound:
        return False
    renamed = f"{RENAMED}{new_name}"
    if MADE_BY_CONVOY not in found.tags or renamed in found.tags:
        return False
    for schedule in found.schedules:
        client.update_deployment_schedule(found.id, schedule.id, active=False)
    client.delete_resource_owned_automations(f"prefect.deployment.{found.id}")
    tags = [tag for tag in found.tags if not tag.startswith(RENAMED)]
    note = f"An older name of {new_name}, kept for scripts."
    client.update_deployment(found.id, DeploymentUpdate(description=note, tags=[*tags, renamed]))
    return True


def ensure_pool(name: str) -> None:
    """Creates a work pool of type process if there is none of that name."""
    with get_client(sync_client=True) as client:
        try:
            client.read_work_pool(name)
        except ObjectNotFound:
            client.create_work_pool(WorkPoolCreate(name=name, type="process", description=POOL_DESCRIPTION))


def queues_to_serve(pool: str, platform: "Platform") -> list[str]:
    """Returns the work queues of a worker: first its platform's own, which it creates, then all but other platforms'.

    Resumptions wait in the queue of their platform, since only workers of equal platforms give equal weights.
    """
    digest = hashlib.sha256(platform.model_dump_json().encode()).hexdigest()[:PLATFORM_DIGITS]
    own = f"{PLATFORM_QUEUE}{digest}"
    described = f"torch {platform.torch}, {platform.instruction_set}, code {platform.code_digest[:PLATFORM_DIGITS]}"
    with get_client(sync_client=True) as client:
        known = [queue.name for queue in client.read_work_queues(work_pool_name=pool)]
        if own not in known:
            with suppress(ObjectAlreadyExists):  # another worker was faster
                client.create_work_queue(own, f"Trainings to resume with {described}", work_pool_name=pool)
    return [own, *(name for name in known if not name.startswith(PLATFORM_QUEUE))]


def _read(file: Path) -> dict[str, Any]:
    """Returns a file in Prefect's format, with deployments that can be used."""
    try:
        project: dict[str, Any] = yaml.safe_load(file.read_text())
        entries = project["deployments"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UsageError(f"{file} is no file of deployments: {one_line(error)}") from None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UsageError(f"{file}: `deployments` must be a list, each with name, entrypoint and work_pool")
    for entry in entries:
        if missing := {"name", "entrypoint", "work_pool"} - entry.keys():
            raise UsageError(f"{file}: a deployment lacks {', '.join(sorted(missing))}")
        if not isinstance(entry.get("older_names", []), list):
            raise UsageError(f"{file}: older_names of {entry['name']} must be a list of names")
        if any("slug" not in schedule for schedule in entry.get("schedules", [])):
            raise UsageError(f"{file}: every schedule of {entry['name']} needs a slug, which identifies it")
    return project


def flow_of(entrypoint: str) -> Flow[..., Any]:
    """Returns the flow at an entrypoint such as `flows.train.train_flow`."""
    return load_flow_from_entrypoint(entrypoint)


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
        parameters = {"config": config.model_dump(mode="json", exclude_unset=True), "force": force}
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
    return Started(id=run.id, url=url_for("flow-run", obj_id=run.id) or str(run.id))


def job_variables(code: CodeConfig) -> dict[str, Any]:
    """Returns what makes Prefect's process worker run a flow run with the code of a commit."""
    variables = {REPOSITORY_VARIABLE: code.repository, COMMIT_VARIABLE: code.ref}
    return {"command": COMMAND, "env": {name: value for name, value in variables.items() if value}}


def find_deployment(client: SyncPrefectClient, name: str) -> DeploymentResponse:
    """Returns the deployment of that name; the one that replaces it, if it has been renamed since.

    Raises:
        UsageError: there is none.
    """
    try:
        found = client.read_deployment_by_name(name)
    except ObjectNotFound:
        known = ", ".join(sorted(each.name for each in client.read_deployments())) or "none; see `convoy deploy`"
        raise UsageError(f"Prefect has no deployment {name}; there are: {known}") from None
    renamed = [tag.removeprefix(RENAMED) for tag in found.tags if tag.startswith(RENAMED)]
    return find_deployment(client, renamed[0]) if renamed else found


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
                report(f"it goes on as flow run {url_for('flow-run', obj_id=successor) or successor}")
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
    try:
        return run, UUID(str(run.labels.get(RESUMED_BY)))
    except ValueError:  # the reason why nothing goes on
        return run, None


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
    return f"flow run {found.name} is being cancelled: {url_for('flow-run', obj_id=found.id)}"


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
