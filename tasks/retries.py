"""Which failures of a task are worth another try."""

from collections.abc import Callable
from typing import Any, TypeVar

from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

from infra.errors import Outage
from tasks.cancel import stop_if_cancelled
from tasks.outage import through_outage
from tasks.progress import run_logger

T = TypeVar("T")

PATIENCE = 600.0  # seconds that an outage may last


def may_pass(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether what failed may succeed in a while: an outage may; a mistake, a refusal or a NaN never do."""
    return isinstance(state.result(raise_on_failure=False), Outage)


RETRIED: dict[str, Any] = {
    "retries": 8,
    "retry_delay_seconds": [3, 15, 30, 60, 60, 60, 60, 60],  # short ones, after which a cancel is noticed
    "retry_jitter_factor": 0.3,
    "retry_condition_fn": may_pass,
}
"""Options of a task that can be done again: servers that restart are waited for, longer each time."""


def outlast(work: Callable[[], T], *, patience: float = PATIENCE) -> T:
    """Returns what `work` returns, tried again while a server is away, for the end of a training, which is no task that
    could be done again.

    Raises:
        Cancelled: the flow run was cancelled meanwhile.
        Outage: it lasted longer than `patience` seconds.
    """
    return through_outage(work, lambda line: run_logger().warning("%s", line), patience, check=stop_if_cancelled)
