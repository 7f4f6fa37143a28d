"""Finds workers and the flow runs of trainings, and reports those whose process on this machine was killed to Prefect.

<home>/flows/<flow run>      a lock that the flow's process holds; the kernel releases it when the process ends
"""

import os
import sys
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from uuid import UUID

import httpx
from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterEndTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import TERMINAL_STATES, FlowRun, State, StateType, Worker, WorkerStatus
from prefect.client.schemas.responses import SetStateStatus
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.states import Cancelled, Crashed
from prefect.utilities.urls import url_for

from infra.errors import UsageError, without_login
from infra.machine.locks import is_held, locked, note_of_dead_holder, try_locked
from infra.settings import Settings
from infra.tracking.tags import ALIVE, RESUMABLE, RESUMED_BY

TRAINING_FLOWS, TRIAL_FLOWS = ("train", "retrain", "sweep"), ("trial", "judge")
PAGE = 200  # results per request to Prefect
BEAT_SECONDS = 30.0  # between two signs of life
DEAD = (StateType.CRASHED, StateType.FAILED)  # of flow runs with these states, `may_go_on` says which may go on
KNOWN_FOR = timedelta(hours=1)  # after its end, a flow run whose process was killed
DEAD_FOR_AT_MOST = timedelta(days=7)  # of dead flow runs that are looked at

_labelling = threading.Lock()
"""Prefect merges labels in two steps, so that of two requests at the same moment one would be lost."""


def flow_run_id() -> UUID | None:
    """Returns the id of the current flow run; None outside a flow run."""
    context = FlowRunContext.get()
    return context.flow_run.id if context and context.flow_run else None


def page_of(flow_run: UUID | str) -> str:
    """Returns the address of a flow run's page, without user and password, for people to see; its id without a page."""
    return without_login(url_for("flow-run", obj_id=flow_run) or str(flow_run))


def is_deployed() -> bool:
    """Returns whether this is a flow run of a deployment."""
    context = FlowRunContext.get()
    return context is not None and context.flow_run is not None and context.flow_run.deployment_id is not None


def enter_project() -> None:
    """Changes from Prefect's temporary folder to the worker's, in a flow run that a worker has started.

    Raises:
        UsageError: there is no such folder.
    """
    folder = Settings().project
    if folder is None or not is_deployed():
        return
    try:
        os.chdir(folder)
    except OSError as error:
        raise UsageError(f"CONVOY_PROJECT: {folder}: {error.strerror}") from None
    sys.path[:] = [place for place in sys.path if os.path.isabs(place)]  # Prefect has put the working folder first


@contextmanager
def flow_is_alive() -> Iterator[None]:
    """Shows that this flow run's process lives while the block runs: by a lock here, and by a label that changes.

    Only a flow run of a deployment has the label, since only such a one is resumed.
    """
    flow, ended = flow_run_id(), threading.Event()
    with locked(_folder() / str(flow)):
        if flow and is_deployed():
            threading.Thread(target=_beat, args=(flow, ended), name="alive", daemon=True).start()
        try:
            yield
        finally:
            ended.set()


def _beat(flow_run_id: UUID, ended: threading.Event) -> None:
    """Changes a label of the flow run every `BEAT_SECONDS`, so that workers elsewhere notice if it ends."""
    for beat in count():
        with suppress(httpx.HTTPError, PrefectException):
            _label(flow_run_id, {ALIVE: str(beat)})
        if ended.wait(BEAT_SECONDS):
            return


def may_go_on(run: FlowRun) -> bool:
    """Returns whether a flow run of a deployment has ended without reporting a result, and nothing goes on with it yet.

    A person's cancellation, a mistake, a refusal and any other failure is a result.
    """
    died = run.state_type == StateType.CRASHED or (run.state_type == StateType.FAILED and RESUMABLE in run.labels)
    return died and run.deployment_id is not None and RESUMED_BY not in run.labels


def is_alive_here(flow_run_id: str) -> bool:
    """Returns whether a process of this state folder runs the flow run."""
    return is_held(_folder() / flow_run_id)


def training_flow_runs(
    client: SyncPrefectClient, states: Collection[StateType], *, ended_after: datetime | None = None
) -> Iterator[FlowRun]:
    """Yields the flow runs of trainings, and of trials of commits, in any of these states, page by page.

    Args:
        ended_after: excludes flow runs that ended earlier, or have not ended.
    """
    flows = FlowFilter(name=FlowFilterName(any_=[*TRAINING_FLOWS, *TRIAL_FLOWS]))
    wanted = FlowRunFilter(
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(states))),
        end_time=FlowRunFilterEndTime(after_=ended_after) if ended_after else None,
    )
    seen = 0
    while page := client.read_flow_runs(flow_filter=flows, flow_run_filter=wanted, limit=PAGE, offset=seen):
        yield from page
        seen += len(page)


def online_workers(client: SyncPrefectClient, pool: str) -> list[Worker]:
    """Returns the workers of a pool that Prefect has heard of lately; none if there is no such pool."""
    try:
        return [each for each in client.read_workers_for_work_pool(pool) if each.status == WorkerStatus.ONLINE]
    except ObjectNotFound:
        return []


def killed_flow_runs() -> Iterator[FlowRun]:
    """Yields the flow runs whose process on this machine was killed, also those that have ended since in Prefect.

    Those that ended more than `KNOWN_FOR` ago are forgotten. Scheduled flow runs are excluded: a worker will run them
    again.
    """
    for lock in sorted(_folder().glob("*")):
        if note_of_dead_holder(lock) is None:
            continue
        found = read_flow_run(lock.name)
        if found is None or found.state is None or _ended_long_ago(found.state):
            lock.unlink(missing_ok=True)
        elif found.state_type != StateType.SCHEDULED and note_of_dead_holder(lock) is not None:
            yield found  # checked again: at first a flow may have made the file and not locked it yet


def _ended_long_ago(state: State) -> bool:
    return state.is_final() and state.timestamp < datetime.now(UTC) - KNOWN_FOR


def settle_killed_flow_runs() -> list[FlowRun]:
    """Marks unfinished flow runs whose process on this machine was killed as crashed; returns them as they were."""
    killed = [each for each in killed_flow_runs() if each.state_type not in TERMINAL_STATES]
    for each in killed:
        mark_dead(str(each.id))
    return killed


def forget_killed(flow_run_id: str) -> None:
    """Lets `killed_flow_runs` yield a flow run no more, unless its process is killed again."""
    with try_locked(_folder() / flow_run_id):  # which removes the file, if no process holds it by now
        pass


def label_flow_run(labels: dict[str, str]) -> None:
    """Adds or changes labels of this flow run; does nothing outside a flow run."""
    if flow := flow_run_id():
        _label(flow, labels)


def _label(flow_run_id: UUID, labels: dict[str, str]) -> None:
    with _labelling, get_client(sync_client=True) as client:
        client.update_flow_run_labels(flow_run_id, dict(labels))


def give_up_tries() -> None:
    """Tells Prefect not to run this flow run again, even if the flow has retries; does nothing outside a flow run."""
    if flow := flow_run_id():
        # An outage must not turn a refusal into a failure.
        with suppress(httpx.HTTPError), get_client(sync_client=True) as client:
            policy = client.read_flow_run(flow).empirical_policy
            if policy.retries:
                client.update_flow_run(flow, empirical_policy=policy.model_copy(update={"retries": 0}))


def read_flow_run(flow_run_id: str) -> FlowRun | None:
    """Returns the flow run with this id; None if Prefect has none."""
    try:
        with get_client(sync_client=True) as client:
            return client.read_flow_run(UUID(flow_run_id))
    except (ValueError, ObjectNotFound):
        return None


def mark_dead(flow_run_id: str, why: str = "its process was killed") -> None:
    """Marks a flow run as crashed in Prefect, or as cancelled if somebody asked for that, unless it has ended there."""
    found = read_flow_run(flow_run_id)
    if found is None or found.state is None or found.state.is_final():
        return
    state: State[None] = (Cancelled if found.state.type == StateType.CANCELLING else Crashed)(message=why)
    with get_client(sync_client=True) as client:
        # Without force, Prefect releases what the flow run held.
        answer = client.set_flow_run_state(found.id, state)
        if answer.status != SetStateStatus.ACCEPT:
            client.set_flow_run_state(found.id, state, force=True)


def _folder() -> Path:
    return Settings().home / "flows"
