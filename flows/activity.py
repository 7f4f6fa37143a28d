"""What the service does now, for `convoy status` and Prefect: workers, and trainings that run, wait, died or come."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any, Literal
from uuid import UUID

from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterType
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import ArtifactSort

from flows.run_names import model_name
from infra.errors import ServiceError
from infra.records import Record
from infra.storage.object_store import open_bucket
from infra.tracking.tags import HELD_LEASE, MLFLOW_RUN, RESUMED_BY, TRIAL
from tasks.config.run import RunConfig
from tasks.orchestration.flow_runs import DEAD, may_go_on, online_workers, training_flow_runs
from tasks.orchestration.model_lease import UNFINISHED, limit_of
from tasks.orchestration.progress import duration
from tasks.reporting.markdown import table
from tasks.training.checkpoints import commits_of

Kind = Literal["worker", "training", "waiting", "died", "next"]

PAGE_KEY = "convoy-status"
DIED_WITHIN = timedelta(days=1)
HEAD = ("", "what", "where it stands")


class Activity(Record):
    """A worker, or a flow run of a training."""

    kind: Kind
    """`training`: it runs. `waiting`: for a worker. `died`: without reporting a result. `next`: on schedule, later."""

    name: str
    detail: str
    flow_run_id: UUID | None = None
    checkpoint_step: int | None = None
    checkpoint_age_seconds: float | None = None

    def cells(self) -> tuple[str, str, str]:
        return self.kind, self.name, self.detail


def activities() -> list[Activity]:
    """Returns what the service does now.

    Raises:
        httpx.HTTPError: Prefect failed.
    """
    with get_client(sync_client=True) as client:
        return [*_workers(client), *_unfinished(client), *_died(client), *_scheduled(client)]


def publish(found: list[Activity], page: UUID | None) -> UUID:
    """Writes the page `convoy-status` among Prefect's artifacts; returns its id.

    Args:
        page: id of the page to replace; None to make one.
    """
    lines = ["# What Convoy does now", "", f"As of {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.", ""]
    text = "\n".join([*lines, *table(HEAD, (each.cells() for each in found), "lll")])
    with get_client(sync_client=True) as client:
        if page is not None:
            client.update_artifact(page, ArtifactUpdate(data=text))
            return page
        about = "Workers, and trainings that run, wait or are due"
        return client.create_artifact(ArtifactCreate(key=PAGE_KEY, type="markdown", data=text, description=about)).id


def _workers(client: SyncPrefectClient) -> Iterator[Activity]:
    for pool in client.read_work_pools():
        for worker in online_workers(client, pool.name):
            seen = f", last heard of {_age(worker.last_heartbeat_time)} ago" if worker.last_heartbeat_time else ""
            yield Activity(kind="worker", name=worker.name, detail=f"pool {pool.name}{seen}")


def _unfinished(client: SyncPrefectClient) -> Iterator[Activity]:
    runs = list(training_flow_runs(client, UNFINISHED))
    holders = {run.labels.get(HELD_LEASE): run for run in runs if run.labels.get(HELD_LEASE)}
    for run in runs:
        step, age = _checkpoint(run)
        checkpoint = "" if age is None else f"; checkpoint of step {step:,} {duration(age)} ago"
        yield Activity(
            kind="training",
            name=run.name,
            detail=f"{_stands(client, run, holders)}{checkpoint}",
            flow_run_id=run.id,
            checkpoint_step=step,
            checkpoint_age_seconds=age,
        )


def _stands(client: SyncPrefectClient, run: FlowRun, holders: Mapping[Any, FlowRun]) -> str:
    """Returns how far a flow run is, or what it waits for."""
    if run.state_type == StateType.PAUSED:
        return f"waits for a person's approval{_time_in_state(run)}"
    if run.state_type != StateType.RUNNING:
        return f"{run.state_name}{_time_in_state(run)}"
    holder = None
    with suppress(ValueError):  # the parameters of another version of Convoy
        config = RunConfig.model_validate(run.parameters.get("config", {}))
        holder = holders.get(limit_of(model_name(config)))
    if holder and holder.id != run.id and TRIAL not in run.labels:
        return f"waits for the end of {holder.name}, which trains the same model{_time_in_state(run)}"
    found = client.read_artifacts(
        artifact_filter=ArtifactFilter(
            flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]), type=ArtifactFilterType(any_=["progress"])
        ),
        sort=ArtifactSort.CREATED_DESC,
        limit=1,
    )
    return (found[0].description if found else None) or f"runs{_time_in_state(run)}"


def _died(client: SyncPrefectClient) -> Iterator[Activity]:
    after = datetime.now(UTC) - DIED_WITHIN
    for run in training_flow_runs(client, DEAD, ended_after=after):
        by = str(run.labels.get(RESUMED_BY, ""))
        if may_go_on(run):
            detail = "a worker with the same code, libraries and kind of processor resumes it"
        elif by.startswith("none: "):
            detail = f"not resumed: {by.removeprefix('none: ')}"
        else:
            continue
        died = f"; it died {_age(run.state.timestamp)} ago" if run.state else ""
        yield Activity(kind="died", name=run.name, detail=f"{detail}{died}", flow_run_id=run.id)


def _scheduled(client: SyncPrefectClient) -> Iterator[Activity]:
    """Yields the runs that wait for a worker, then the next run of each schedule."""
    now, next_ones = datetime.now(UTC), dict[UUID | None, FlowRun]()
    for run in training_flow_runs(client, [StateType.SCHEDULED]):
        at = run.next_scheduled_start_time or run.expected_start_time
        if at is None or at <= now:
            queue = f"queue {run.work_queue_name} of pool {run.work_pool_name}"
            waits = "waits until it is tried again" if run.deployment_id is None else f"waits for a worker, in {queue}"
            yield Activity(kind="waiting", name=run.name, detail=f"{waits}{_time_in_state(run)}", flow_run_id=run.id)
        elif (first := next_ones.get(run.deployment_id)) is None or at < _start(first):
            next_ones[run.deployment_id] = run
    for deployment_id, run in sorted(next_ones.items(), key=lambda each: _start(each[1])):
        name = client.read_deployment(deployment_id).name if deployment_id else run.name
        yield Activity(kind="next", name=name, detail=f"at {_start(run):%Y-%m-%d %H:%M} UTC", flow_run_id=run.id)


def _start(run: FlowRun) -> datetime:
    return run.next_scheduled_start_time or run.expected_start_time or datetime.max.replace(tzinfo=UTC)


def _checkpoint(run: FlowRun) -> tuple[int | None, float | None]:
    """Returns step and age in seconds of a training's newest checkpoint; None without one, or without the storage."""
    if run_id := run.labels.get(MLFLOW_RUN):
        with suppress(ServiceError):
            if newest := next(commits_of(open_bucket(), str(run_id)), None):
                return newest.step, max(0.0, datetime.now(UTC).timestamp() - newest.committed)
    return None, None


def _time_in_state(run: FlowRun) -> str:
    """Returns how long a flow run has been in its state, in brackets."""
    return f" ({_age(run.state.timestamp)})" if run.state else ""


def _age(moment: datetime) -> str:
    return duration((datetime.now(UTC) - moment).total_seconds())
