"""Produces the next items on another thread while the current item is in use."""

import queue
import threading
from collections.abc import Generator
from contextlib import closing
from typing import TypeVar

T = TypeVar("T")


def read_ahead(items: Generator[T, None, None], depth: int) -> Generator[T, None, None]:
    """Yields the same items; a thread produces up to `depth` of them before they are requested.

    The thread starts when the first item is requested. An error of the thread is raised in place of the item. The
    thread ends with the last item, or when this generator is closed or garbage-collected.
    """
    ready: queue.SimpleQueue[T | _End] = queue.SimpleQueue()
    free_slots = threading.Semaphore(depth)
    closed = threading.Event()

    def produce() -> None:
        end = _End()
        try:
            with closing(items):
                for item in items:
                    free_slots.acquire()
                    if closed.is_set():
                        return
                    ready.put(item)
        except BaseException as error:
            end = _End(error)
        ready.put(end)

    thread = threading.Thread(target=produce, name="read-ahead", daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            free_slots.release()
            yield item
        if item.error:
            raise item.error
    finally:
        closed.set()
        free_slots.release()
        thread.join()


class _End:
    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error
