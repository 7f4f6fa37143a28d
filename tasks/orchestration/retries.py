"""Which failures of a task are worth another try, and the wait for it, which a signal or a cancel ends."""

import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

from infra.errors import Outage
from infra.machine import stopping
from tasks.orchestration.cancellation import ASK_EVERY, CancelWatch, stop_if_cancelled
from tasks.orchestration.outage import through_outage
from tasks.orchestration.progress import run_logger

T = TypeVar("T")

PATIENCE = 600.0  # seconds that an outage may last
PAUSES = (3.0, 15.0, 30.0, 60.0, 60.0, 60.0, 60.0, 60.0)  # seconds before each further try of a task
JITTER = 0.3  # share by which a pause varies, lest many flows come back at once


def may_pass(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Returns whether what failed may succeed in a while: an outage may; a mistake, a refusal or a NaN never do.

    It waits for that while itself: Prefect would sleep through a signal, and through a cancel.

    Raises:
        Stopped, TerminationSignal: as `stop_if_told`.
    """
    if not isinstance(error := state.result(raise_on_failure=False), Outage):
        return False
    seconds = PAUSES[min(run.run_count, len(PAUSES)) - 1] * random.uniform(1 - JITTER, 1 + JITTER)
    run_logger().warning("%s; trying again in %.0f s", error, seconds)
    _pause(seconds)
    return True  # also if it was cancelled: tasks look for that before they begin


RETRIED: dict[str, Any] = {"retries": len(PAUSES), "retry_delay_seconds": 0, "retry_condition_fn": may_pass}
"""Options of a task that can be done again: servers that restart are waited for, longer each time."""


def outlast(work: Callable[[], T], *, patience: float = PATIENCE) -> T:
    """Returns what `work` returns, tried again while a server is away, for the end of a training, which is no task that
    could be done again.

    Raises:
        Cancelled: the flow run was cancelled meanwhile.
        Stopped, TerminationSignal: as `stop_if_told`.
        Outage: it lasted longer than `patience` seconds.
    """

    def wait(seconds: float) -> None:
        _pause(seconds)
        stop_if_cancelled()

    return through_outage(work, lambda line: run_logger().warning("%s", line), patience, wait=wait)


def _pause(seconds: float) -> None:
    """Waits so many seconds, or until the flow run is cancelled.

    Raises:
        Stopped, TerminationSignal: as `stop_if_told`.
    """
    until = time.monotonic() + seconds
    is_to_end = CancelWatch()
    while not is_to_end() and (left := until - time.monotonic()) > 0:
        stopping.wait(min(left, ASK_EVERY))
