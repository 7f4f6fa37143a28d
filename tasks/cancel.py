"""Whether the flow run was cancelled: Prefect only marks it so, and leaves it to the flow to end."""

import time
from uuid import UUID

import httpx
from prefect import get_client
from prefect.client.schemas.objects import StateType
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectException

from tasks.progress import run_logger

ASK_EVERY = 2.0  # seconds between questions


class Cancelled(RuntimeError):
    """The flow run was cancelled in Prefect."""

    exit_status = 75


class CancelWatch:
    """Asks Prefect now and then whether this flow run is to be cancelled; an unreachable Prefect says no."""

    def __init__(self) -> None:
        self._asked = time.monotonic()

    def __call__(self) -> bool:
        if time.monotonic() - self._asked < ASK_EVERY:
            return False
        self._asked = time.monotonic()
        return is_cancelled()


def is_cancelled() -> bool:
    """Ask Prefect now; no if this is no flow run, or Prefect does not answer."""
    flow_run = _flow_run()
    if flow_run is None:
        return False
    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(flow_run).state
    except (httpx.HTTPError, PrefectException) as error:
        run_logger().debug("cannot ask Prefect about the flow run: %s", error)
        return False
    return state is not None and state.type in (StateType.CANCELLING, StateType.CANCELLED)


def stop_if_cancelled() -> None:
    """Raise Cancelled if this flow run is to be cancelled; tasks too short to watch ask once, before they begin."""
    if is_cancelled():
        raise Cancelled("the flow run was cancelled")


def _flow_run() -> UUID | None:
    context = FlowRunContext.get()
    return context.flow_run.id if context and context.flow_run else None
