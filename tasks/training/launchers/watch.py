"""Warns people while a scheduler cannot start agents."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from infra.errors import one_line
from tasks.training.protocol.job import Event, JobFolder

POLL_SECONDS = 5.0


@contextmanager
def watching(poll: Callable[[], Iterable[str]], folder: JobFolder) -> Iterator[None]:
    """Calls `poll` every few seconds, in the block; turns each line that the last poll did not return into a warning.

    Polls in a thread, since a scheduler may take long to answer, and the coordinator must not fall silent meanwhile.
    """
    over = threading.Event()

    def watch() -> None:
        known: set[str] = set()
        while not over.wait(POLL_SECONDS):
            try:
                found = set(poll())
            except Exception as error:  # of a scheduler's client, say: the next poll may succeed
                found = {one_line(error) or type(error).__name__}
            for line in sorted(found - known):
                folder.write_event(Event(warning=line))
            known = found

    thread = threading.Thread(target=watch, name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(POLL_SECONDS)
