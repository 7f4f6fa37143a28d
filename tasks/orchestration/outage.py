"""Waits for servers that are away for a while: a short outage should not cost the long work before it."""

import time
from collections.abc import Callable
from typing import TypeVar

from infra.errors import Outage

PATIENCE = 180.0  # seconds; a restart of a server, or a node of it, takes less
LONGEST_PAUSE = 10.0  # seconds between tries

Result = TypeVar("Result")


def through_outage(
    work: Callable[[], Result],
    warn: Callable[[str], None],
    patience: float = PATIENCE,
    *,
    wait: Callable[[float], None] = time.sleep,
) -> Result:
    """Returns what `work` returns, tried again while a server is away.

    Args:
        work: may be done twice.
        warn: told in one line when an outage begins.
        patience: seconds after which an outage is too long.
        wait: waits so many seconds before a further try; may raise, to end the waiting.

    Raises:
        Outage: the server is away for longer than that.
    """
    deadline, pause = time.monotonic() + patience, 1.0
    while True:
        try:
            return work()
        except Outage as error:
            if time.monotonic() > deadline:
                raise
            if pause == 1.0:
                warn(f"trying again for up to {patience:.0f} s: {error}")
        wait(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
