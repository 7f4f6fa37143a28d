"""Registers deployments with Prefect, from a file or for a project, with their work pools and queues."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any

import yaml
from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentUpdate, WorkPoolCreate
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.flows import load_flow_from_entrypoint
from pydantic import BaseModel, ValidationError, field_validator

from flows.at_commit import COMMAND, REPOSITORY_VARIABLE
from flows.run_names import model_name, with_name
from infra.errors import ServiceError, UsageError, one_line
from infra.sources.entries import is_table
from infra.sources.slug import slug
from infra.tracking.provenance import COMMIT_VARIABLE
from tasks.config.deployment import CodeConfig, ProjectConfig, ScheduleConfig
from tasks.config.key_values import explain

if TYPE_CHECKING:
    from tasks.training.platform import Platform

DEPLOYMENTS = Path(__file__).parents[1] / "infra" / "prefect.yaml"
EXAMPLE = "fashion-mnist"
"""The name in that file of the deployments that are copied for a project, with another name."""

SHARED = "prune/storage"
"""The one deployment that all projects at a Prefect share."""

RETRAIN, PRUNE = "flows.retrain.retrain_flow", "flows.prune.prune_flow"

MADE_BY_CONVOY = "convoy"
"""Tag of the deployments in Convoy's own file, and in copies of it."""

RENAMED = "renamed:"
"""Prefix of the tag of a deployment that has another name now, which follows."""

POOL_DESCRIPTION = "Flow runs that are due, and wait for a machine on which `convoy worker` runs."
PLATFORM_QUEUE, PLATFORM_DIGITS = "platform-", 8
PREFECT_PROGRAM = (
    "import cnn, infra, tasks, flows, runpy; runpy.run_module('prefect', run_name='__main__', alter_sys=True)"
)
"""Prefect's command line with Convoy's packages loaded: Prefect searches the working folder first, which may hold other
packages of these names."""


def deploy(file: Path, switch: bool | None = None) -> Iterator[str]:
    """Reads a file in Prefect's format, and returns an iterator that registers its deployments; see `_deploy`.

    Raises:
        UsageError: the file cannot be used.
    """
    project = _read(file)
    return _deploy(project, project["deployments"], switch)


def deploy_project(project: ProjectConfig, switch: bool | None = None) -> Iterator[str]:
    """Registers the deployments of a project; see `_deploy`.

    They are made of Convoy's own file, with the configuration as it is now: `retrain/NAME`, and `prune/storage` if the
    project says what to keep. If it does not, a line says that `prune/storage`, which projects share, stays on.
    """
    yield from _deploy({"name": "convoy", "pull": []}, list(_project_entries(project)), switch)
    if not project.deploy.prunes:
        with suppress(ObjectNotFound), get_client(sync_client=True) as client:
            if any(schedule.active for schedule in client.read_deployment_by_name(SHARED).schedules):
                yield f"{SHARED}  stays on as deployed, maybe for another project; Prefect's page of it switches it off"


def _project_entries(project: ProjectConfig) -> Iterator[dict[str, Any]]:
    name, deploy = model_name(project), project.deploy
    own = yaml.safe_load(DEPLOYMENTS.read_text(encoding="utf-8"))
    text = json.dumps(own["deployments"]).replace(EXAMPLE, json.dumps(name)[1:-1])
    example = {entry["entrypoint"]: entry for entry in json.loads(text)}
    pool: dict[str, Any] = {"name": deploy.pool}

    def entry(flow: str, schedule: ScheduleConfig | None, parameters: dict[str, Any], **changes: Any) -> dict[str, Any]:
        when = []
        if schedule and schedule.cron:
            kept = example[flow]["schedules"][0]["slug"]
            when = [{"slug": kept, "cron": schedule.cron, "timezone": schedule.timezone}]
        return {**example[flow], "parameters": parameters, "schedules": when, "work_pool": pool, **changes}

    triggers = example[RETRAIN]["triggers"] if deploy.new_data else []
    source, older_names = Path(project.dataset).name, list(deploy.older_names)
    if is_table(source) and not project.name:
        older_names.append(slug(source))  # of a label table, it had the suffix in Convoy 0.1
    older = {"older_names": older_names, "triggers": triggers}
    config = with_name(project.run).model_dump(mode="json", exclude_unset=True)
    with_code = {"work_pool": pool | {"job_variables": job_variables(deploy.code)}} if deploy.code.ref else {}
    yield entry(RETRAIN, deploy.schedule, {"config": config}, **older, **with_code)
    if deploy.trial_pool:
        for flow, its_pool in (("trial", deploy.trial_pool), ("judge", deploy.pool)):
            earlier = [f"{older_name}-{flow}" for older_name in older_names]
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
        [
            f"{load_flow_from_entrypoint(entry['entrypoint']).name}/{name}"
            for name in (entry["name"], *entry.get("older_names", ()))
        ]
        for entry in entries
    ]
    before, retired = _states(chain(*names))
    for known, entry in zip(names, entries, strict=True):
        states = dict[tuple[str, str | None], bool]()
        for name in reversed(sorted(known, key=retired.__contains__)):  # the last one decides: by its present name
            states |= before.get(name, {})
        schedules, triggers = entry.get("schedules") or [], entry.get("triggers") or []
        if switch is not None:
            states |= {("schedule", each["slug"]): switch for each in schedules}
        if schedules:
            entry["schedules"] = [
                each | {"active": states.get(("schedule", each["slug"]), each.get("active", True))}
                for each in schedules
            ]
        if triggers:
            named = [
                {"name": f"{entry['name']}__automation_{number}", **each}  # Prefect's name for a trigger without one
                for number, each in enumerate(triggers, start=1)
            ]
            entry["triggers"] = [
                each | {"enabled": states.get(_trigger(each["name"], entry["name"]), each.get("enabled", True))}
                for each in named
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
            schedules = {schedule["slug"]: schedule for schedule in entry.get("schedules") or []}
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
                found[name] |= {_trigger(trigger.name, deployment.name): trigger.enabled for trigger in triggers}
                if renamed_to(deployment.tags):
                    retired.add(name)
    return found, retired


def _trigger(name: str, deployment: str) -> tuple[str, str]:
    """Returns the key of a trigger in `_states`: most are named after their deployment, which may be renamed."""
    return "trigger", name.replace(deployment, "")


def renamed_to(tags: Iterable[str]) -> str | None:
    """Returns the name that a deployment with these tags has now; None if it is still its own."""
    return next((tag.removeprefix(RENAMED) for tag in tags if tag.startswith(RENAMED)), None)


def _retire(client: SyncPrefectClient, old_name: str, new_name: str) -> bool:
    """Switches off schedules and triggers of a deployment that now has another name; returns whether it had to.

    The deployment remains, since scripts may start flow runs by its name. A deployment without the tag `convoy` is not
    one of Convoy's, and stays as it is.
    """
    try:
        found = client.read_deployment_by_name(old_name)
    except ObjectNotFound:
        return False
    if MADE_BY_CONVOY not in found.tags or renamed_to(found.tags) == new_name:
        return False
    for schedule in found.schedules:
        client.update_deployment_schedule(found.id, schedule.id, active=False)
    client.delete_resource_owned_automations(f"prefect.deployment.{found.id}")
    tags = [tag for tag in found.tags if not tag.startswith(RENAMED)]
    note = f"An older name of {new_name}, kept for scripts."
    client.update_deployment(found.id, DeploymentUpdate(description=note, tags=[*tags, f"{RENAMED}{new_name}"]))
    return True


def ensure_pool(name: str) -> None:
    """Creates a work pool of type process if there is none of that name."""
    with get_client(sync_client=True) as client:
        try:
            client.read_work_pool(name)
        except ObjectNotFound:
            with suppress(ObjectAlreadyExists):  # another worker was faster
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
        project = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{file} is no file of deployments: {one_line(error)}") from None
    project = project if isinstance(project, dict) else {}
    try:
        _Deployments.model_validate(project)
    except ValidationError as error:
        raise UsageError(f"{file}: {explain(error, _Deployments, project)}") from None
    return project


class _Pool(BaseModel):
    name: str


class _Schedule(BaseModel):
    slug: str
    """Identifies it, so that it stays on or off."""


class _Deployment(BaseModel):
    name: str
    entrypoint: str
    work_pool: _Pool
    older_names: list[str] = []
    schedules: list[_Schedule] | None = None
    triggers: list[dict[str, Any]] | None = None

    @field_validator("entrypoint")
    @classmethod
    def _can_be_loaded(cls, entrypoint: str) -> str:
        try:
            load_flow_from_entrypoint(entrypoint)
        except Exception as error:  # of Prefect, or of the module
            raise ValueError(f"{entrypoint} is no flow ({type(error).__name__}: {one_line(error)})") from None
        return entrypoint


class _Deployments(BaseModel):
    """What Convoy reads of a file in Prefect's format; Prefect checks the rest."""

    deployments: list[_Deployment]


def job_variables(code: CodeConfig) -> dict[str, Any]:
    """Returns what makes Prefect's process worker run a flow run with the code of a commit."""
    variables = {REPOSITORY_VARIABLE: code.repository, COMMIT_VARIABLE: code.ref}
    return {"command": COMMAND, "env": {name: value for name, value in variables.items() if value}}
