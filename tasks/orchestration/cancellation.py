"""Tells whether the flow is to end: cancelled in Prefect, which only marks it so, or asked by a signal."""

import signal
import time

import httpx
from prefect import get_client
from prefect.client.schemas.objects import StateType
from prefect.exceptions import PrefectException, TerminationSignal
from prefect.utilities.engine import is_prefect_sigterm_handler_installed

from infra.machine import stopping
from tasks.orchestration.flow_runs import flow_run_id
from tasks.orchestration.progress import run_logger

ASK_EVERY = 2.0  # seconds between questions


class Cancelled(RuntimeError):
    """The flow run was cancelled in Prefect."""

    exit_status = 75


class CancelWatch:
    """Looks for a signal, and asks Prefect now and then whether this flow run is to be cancelled.

    An unreachable Prefect says no.
    """

    def __init__(self) -> None:
        self._asked = time.monotonic()

    def __call__(self) -> bool:
        stop_if_told()
        if time.monotonic() - self._asked < ASK_EVERY:
            return False
        self._asked = time.monotonic()
        return is_cancelled()


def is_cancelled() -> bool:
    """Ask Prefect now; no if this is no flow run, or Prefect does not answer."""
    if not (flow := flow_run_id()):
        return False
    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(flow).state
    except (httpx.HTTPError, PrefectException) as error:
        run_logger().debug("cannot ask Prefect about the flow run: %s", error)
        return False
    return state is not None and state.type in (StateType.CANCELLING, StateType.CANCELLED)


def stop_if_told() -> None:
    """Raises if a signal has asked this process to end.

    Raises:
        Stopped: the flow is one of the command line.
        TerminationSignal: Prefect's own of the same meaning, in a process of a worker, whose handler's exception got
            lost on its way.
    """
    try:
        stopping.check()
    except stopping.Stopped:
        if is_prefect_sigterm_handler_installed():
            raise TerminationSignal(signal.SIGTERM) from None
        raise


def stop_if_cancelled() -> None:
    """Raises if the flow is to end; tasks too short to watch ask once, before they begin.

    Raises:
        Cancelled: the flow run was cancelled.
        Stopped, TerminationSignal: as `stop_if_told`.
    """
    stop_if_told()
    if is_cancelled():
        raise Cancelled("the flow run was cancelled")
