"""Checks whether the flow must end: it was cancelled in Prefect, which only marks it, or a signal arrived."""

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

POLL_SECONDS = 2.0  # between requests to Prefect


class Cancelled(RuntimeError):
    """The flow run was cancelled in Prefect."""

    exit_status = 75


class Superseded(RuntimeError):
    """Prefect says that this flow run has crashed: a worker took its process for dead, and may have resumed it."""

    exit_status = 75


class CancelWatch:
    """Checks for a signal, and every `POLL_SECONDS` asks Prefect whether this flow run was cancelled."""

    def __init__(self) -> None:
        self._polled = time.monotonic()

    def __call__(self) -> bool:
        stop_if_told()
        if time.monotonic() - self._polled < POLL_SECONDS:
            return False
        self._polled = time.monotonic()
        return is_cancelled()


def is_cancelled() -> bool:
    """Asks Prefect whether this flow run was cancelled; False outside a flow run or if Prefect does not answer.

    Raises:
        Superseded: Prefect says that the flow run has crashed.
    """
    if not (flow := flow_run_id()):
        return False
    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(flow).state
    except (httpx.HTTPError, PrefectException) as error:
        run_logger().debug("cannot ask Prefect about the flow run: %s", error)
        return False
    if state is not None and state.type == StateType.CRASHED:
        raise Superseded(f"this flow run counts as crashed ({state.message}); another one may go on with its training")
    return state is not None and state.type in (StateType.CANCELLING, StateType.CANCELLED)


def stop_if_told() -> None:
    """Raises if a signal has asked this process to end.

    Raises:
        Stopped: the command line runs the flow.
        TerminationSignal: a worker runs the flow. It is Prefect's own; the one that Prefect's handler raised got lost.
    """
    try:
        stopping.check()
    except stopping.Stopped:
        if is_prefect_sigterm_handler_installed():
            raise TerminationSignal(signal.SIGTERM) from None
        raise


def stop_if_cancelled() -> None:
    """Raises if the flow must end; short tasks check only once, before they begin.

    Raises:
        Cancelled: the flow run was cancelled.
        Stopped, TerminationSignal: as `stop_if_told`.
    """
    stop_if_told()
    if is_cancelled():
        raise Cancelled("the flow run was cancelled")
