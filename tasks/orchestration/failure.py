"""Reports the failure of a flow run: to chats, to workers, and to the command that waits for it."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial

import httpx

from infra.errors import GateRefused, one_line
from infra.tracking import tags
from tasks.orchestration.cancellation import Cancelled
from tasks.orchestration.flow_runs import is_deployed, label_flow_run
from tasks.orchestration.messages import tell_failure
from tasks.orchestration.outage import is_prefect_outage
from tasks.orchestration.retries import outlast

MAX_REASON = 200  # characters of why a flow run may go on, in its label


@contextmanager
def failure_told(*, minor: bool) -> Iterator[None]:
    """Tells Prefect of an error in the block, and whether the flow run may go on after it."""
    try:
        yield
    except (GateRefused, Cancelled):
        raise
    except Exception as error:
        labels = {}
        if resumable := getattr(error, "resumable", False) or is_prefect_outage(error):
            labels = {tags.RESUMABLE: one_line(error)[:MAX_REASON]}
        elif (status := getattr(error, "exit_status", 1)) != 1:
            labels = {tags.EXIT_STATUS: str(status)}
        if labels:
            label = partial(label_flow_run, labels)
            with suppress(httpx.HTTPError):  # of a flow run that cannot say how it ended, its process's end is noticed
                outlast(label) if is_deployed() else label()
        tell_failure(error, trial=minor, resumable=resumable)
        raise
