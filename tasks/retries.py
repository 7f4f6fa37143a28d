"""Which failures of a task are worth another try."""

from typing import Any

from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

from infra.errors import Outage


def may_pass(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether what failed may succeed in a while: an outage may; a mistake, a refusal or a NaN never do."""
    return isinstance(state.result(raise_on_failure=False), Outage)


RETRIED: dict[str, Any] = {
    "retries": 4,
    "retry_delay_seconds": [3, 15, 60, 60],  # more than two minutes
    "retry_jitter_factor": 0.3,
    "retry_condition_fn": may_pass,
}
"""Options of a task that can be done again: servers that restart are waited for, longer each time."""
