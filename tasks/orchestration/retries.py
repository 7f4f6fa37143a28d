"""Retries tasks after outages; a signal or a cancellation ends the wait between two tries."""

import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

from infra.errors import one_line
from infra.machine import stopping
from tasks.orchestration.cancellation import POLL_SECONDS, CancelWatch, stop_if_cancelled
from tasks.orchestration.outage import is_outage, through_outage
from tasks.orchestration.progress import run_logger

T = TypeVar("T")

MAX_OUTAGE_SECONDS = 600.0
PAUSES = (3.0, 15.0, 30.0, 60.0, 60.0, 60.0, 60.0, 60.0)  # seconds before each further try of a task
JITTER = 0.3  # share by which a pause varies, so that many flows do not retry at the same moment


def is_outage_after_wait(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Returns whether a task failed by an outage, after a pause; a mistake, a refusal or a NaN would fail again.

    It waits here because Prefect's own wait does not react to a signal or a cancellation.

    Raises:
        Stopped: a signal asked this process to end.
    """
    if not is_outage(error := state.result(raise_on_failure=False)):
        return False
    seconds = PAUSES[min(run.run_count, len(PAUSES)) - 1] * random.uniform(1 - JITTER, 1 + JITTER)
    run_logger().warning("%s; trying again in %.0f s", one_line(error) or type(error).__name__, seconds)
    _pause(seconds)
    return True  # also after a cancellation: tasks check for it before they begin


RETRIED: dict[str, Any] = {"retries": len(PAUSES), "retry_delay_seconds": 0, "retry_condition_fn": is_outage_after_wait}
"""Options of a task that is retried after an outage, with growing pauses."""


def outlast(work: Callable[[], T], *, patience: float = MAX_OUTAGE_SECONDS) -> T:
    """Returns the result of `work`, which is tried again during an outage: for code that is no retried task.

    Raises:
        Cancelled: the flow run was cancelled during the outage.
        Stopped: a signal asked this process to end.
        Outage, httpx.HTTPError: it lasted longer than `patience` seconds.
    """

    def wait(seconds: float) -> None:
        _pause(seconds)
        stop_if_cancelled()

    return through_outage(work, lambda line: run_logger().warning("%s", line), patience, wait=wait)


def _pause(seconds: float) -> None:
    """Waits so many seconds, or until the flow run is cancelled.

    Raises:
        Stopped: a signal asked this process to end.
    """
    until = time.monotonic() + seconds
    cancelled = CancelWatch()
    while not cancelled() and (left := until - time.monotonic()) > 0:
        stopping.wait(min(left, POLL_SECONDS))
