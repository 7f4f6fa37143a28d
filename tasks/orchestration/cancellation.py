"""Checks whether the flow must end: it was cancelled in Prefect, which only marks it, or a signal arrived."""

import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from types import FrameType

import httpx
from prefect import get_client
from prefect.client.schemas.objects import StateType
from prefect.exceptions import PrefectException, TerminationSignal
from prefect.utilities import engine

from infra.machine import stopping
from infra.machine.background import in_background
from infra.machine.threads import result_of
from tasks.orchestration.flow_runs import flow_run_id
from tasks.orchestration.progress import run_logger

POLL_SECONDS = 2.0  # between requests to Prefect


class Cancelled(RuntimeError):
    """The flow run was cancelled in Prefect."""

    exit_status = 75


class Superseded(RuntimeError):
    """Prefect says that this flow run has crashed: a worker took its process for dead, and may have resumed it."""

    exit_status = 75
    resumable = True  # so that a worker resumes it, if none has yet

    def __init__(self, why: str | None) -> None:
        super().__init__(f"this flow run counts as crashed ({why}); another one may go on with its training")


STOPPED = (KeyboardInterrupt, TerminationSignal, stopping.Stopped, Cancelled)
"""What ends a flow early although nothing is wrong; Prefect's own exception if its handler could not be replaced."""


class CancelWatch:
    """Checks for a signal, and every `POLL_SECONDS` asks Prefect whether this flow run was cancelled."""

    def __init__(self) -> None:
        self._polled = time.monotonic()
        self._asked: Future[bool] | None = None

    def __call__(self) -> bool:
        stopping.check()
        if self._asked is None and time.monotonic() - self._polled >= POLL_SECONDS:
            self._polled = time.monotonic()
            self._asked = in_background(is_cancelled)  # an overloaded Prefect may not answer for minutes
        if self._asked is None or not self._asked.done():
            return False
        answered, self._asked = self._asked, None
        return answered.result()


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
        raise Superseded(state.message)
    return state is not None and state.type in (StateType.CANCELLING, StateType.CANCELLED)


@contextmanager
def sigterm_is_checked_for() -> Iterator[None]:
    """Lets SIGTERM raise nothing in the block, which checks for it by `stopping.check`, as on the command line.

    In the process of a worker's flow run, Prefect's handler would raise between any two instructions, so that a folder
    is not removed, or the second of two signals breaks off what the first has begun.

    Raises:
        TerminationSignal: the block has raised Stopped; by this Prefect knows the cause.
    """
    if not (stopping.overhear() and engine.is_prefect_sigterm_handler_installed()):
        yield
        return
    raising = engine._prefect_sigterm_handler
    _replace_handler(stopping.defer)
    try:
        yield
    except stopping.Stopped as stopped:
        if stopped.exit_status == stopping.EXIT_STATUS[signal.SIGTERM]:
            raise TerminationSignal(signal.SIGTERM) from None
        raise
    finally:
        _replace_handler(raising)


def _replace_handler(handler: Callable[[int, FrameType | None], None]) -> None:
    """Replaces Prefect's handler by one that it takes for its own, since it then cancels as usual."""
    with engine._prefect_sigterm_bridge_lock:
        engine._prefect_sigterm_handler = handler  # type: ignore[assignment]
        signal.signal(signal.SIGTERM, handler)


def stop_if_cancelled() -> None:
    """Raises if the flow must end; short tasks check only once, before they begin.

    Raises:
        Cancelled: the flow run was cancelled.
        Stopped: a signal asked this process to end.
    """
    stopping.check()
    if result_of(in_background(is_cancelled)):
        raise Cancelled("the flow run was cancelled")
