"""Finds the flow runs of this machine whose process was killed, and tells Prefect of them.

<home>/flows/<flow run>      a lock that the flow's process holds; the kernel frees it when that ends, however that is
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

from prefect import get_client
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import SetStateStatus
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run
from prefect.states import Crashed

from infra.files import locked
from infra.settings import Settings
from infra.trylock import left_behind

MLFLOW_RUN = "convoy.mlflow_run"  # label of a flow run: its MLflow run
TRAINING_FLOWS = ("train", "retrain")


@contextmanager
def flow_is_alive() -> Iterator[None]:
    """Shows, while the block runs, that the process of this flow run lives."""
    with locked(_folder() / str(flow_run.id)):
        yield


def killed_flow_runs() -> Iterator[FlowRun]:
    """Yields the flow runs whose process on this machine was killed, and which Prefect takes for unfinished.

    One that is scheduled is left out: a worker will take it up again.
    """
    for lock in sorted(_folder().glob("*")):
        if left_behind(lock) is None:
            continue
        found = read_flow_run(lock.name)
        if found is None or found.state is None or found.state.is_final():
            lock.unlink(missing_ok=True)
        elif found.state_type != StateType.SCHEDULED:
            yield found


def settle_killed_flow_runs() -> list[FlowRun]:
    """Tells Prefect of the flow runs whose process on this machine was killed; returns them as they were."""
    killed = list(killed_flow_runs())
    for each in killed:
        mark_crashed(str(each.id))
    return killed


def label_flow_run(labels: dict[str, str]) -> None:
    """Adds labels to this flow run, or changes them; does nothing outside of one."""
    if context := FlowRunContext.get():
        assert context.flow_run
        with get_client(sync_client=True) as client:
            client.update_flow_run_labels(context.flow_run.id, dict(labels))


def read_flow_run(flow_run_id: str) -> FlowRun | None:
    """Returns the flow run of an id; None if Prefect has none."""
    try:
        with get_client(sync_client=True) as client:
            return client.read_flow_run(UUID(flow_run_id))
    except (ValueError, ObjectNotFound):
        return None


def mark_crashed(flow_run_id: str) -> None:
    """Tells Prefect that a flow run was killed, if Prefect does not know how it ended."""
    found = read_flow_run(flow_run_id)
    if found is None or found.state is None or found.state.is_final():
        return
    state: State[None] = Crashed(message="its process was killed")
    with get_client(sync_client=True) as client:
        # Asked rather than ordered, Prefect frees what the flow run held.
        answer = client.set_flow_run_state(found.id, state)
        if answer.status != SetStateStatus.ACCEPT:
            client.set_flow_run_state(found.id, state, force=True)


def _folder() -> Path:
    return Settings().home / "flows"
