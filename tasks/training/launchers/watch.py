"""Tells people what keeps a scheduler's agents from joining."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from infra.errors import ServiceError
from tasks.training.protocol.job import Event, JobFolder

LOOK_EVERY = 5.0  # seconds


@contextmanager
def watching(look: Callable[[], Iterable[str]], folder: JobFolder) -> Iterator[None]:
    """Call `look` every few seconds; what it says becomes a warning, unless it said so the last time.

    In a thread, since a scheduler may take long to answer, and the coordinator must not fall silent meanwhile.
    """
    over = threading.Event()

    def watch() -> None:
        said: set[str] = set()
        while not over.wait(LOOK_EVERY):
            try:
                found = set(look())
            except ServiceError as error:
                found = {str(error)}
            for line in sorted(found - said):
                folder.write_event(Event(warning=line))
            said = found

    thread = threading.Thread(target=watch, name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(LOOK_EVERY)
