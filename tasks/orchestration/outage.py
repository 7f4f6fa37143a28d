"""Retries work during an outage of a server, so that a short outage does not cost the long work before it."""

import time
from collections.abc import Callable
from typing import TypeVar

import httpx

from infra.errors import Outage, one_line

MAX_OUTAGE_SECONDS = 180.0  # a restart of a server, or of one of its nodes, takes less
MAX_PAUSE_SECONDS = 10.0  # between tries

Result = TypeVar("Result")


def is_prefect_outage(error: BaseException) -> bool:
    """Returns whether an error of Prefect's client means that it, or the network in between, is down or overloaded."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in (408, 429, *range(500, 600))
    return isinstance(error, httpx.HTTPError)


def is_outage(error: object) -> bool:
    """Returns whether an error means that a server, Prefect too, is down for now."""
    return isinstance(error, Outage) or (isinstance(error, BaseException) and is_prefect_outage(error))


def through_outage(
    work: Callable[[], Result],
    warn: Callable[[str], None],
    patience: float = MAX_OUTAGE_SECONDS,
    *,
    wait: Callable[[float], None] = time.sleep,
) -> Result:
    """Returns the result of `work`, which is tried again while a server is down.

    Args:
        work: may be called several times.
        warn: is called with one line when an outage begins.
        patience: seconds after which an outage is too long.
        wait: waits so many seconds before the next try; may raise to end the wait.

    Raises:
        Outage, httpx.HTTPError: it lasted longer than `patience`.
    """
    deadline, pause = time.monotonic() + patience, 1.0
    while True:
        try:
            return work()
        except (Outage, httpx.HTTPError) as error:
            if not is_outage(error) or time.monotonic() > deadline:
                raise
            if pause == 1.0:
                warn(f"trying again for up to {patience:.0f} s: {one_line(error) or type(error).__name__}")
        wait(pause)
        pause = min(2 * pause, MAX_PAUSE_SECONDS)
