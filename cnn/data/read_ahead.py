"""Doing the next items' work on another thread while the present one is in use."""

import queue
import threading
from collections.abc import Generator
from contextlib import closing
from typing import TypeVar

T = TypeVar("T")


def read_ahead(items: Generator[T, None, None], depth: int) -> Generator[T, None, None]:
    """The same items, made on a thread, up to `depth` of them before they are asked for.

    The thread starts with the first item that is asked for. What it raises is raised where the item would have come.
    It ends when the items do, or when this generator is closed or given up.
    """
    ready: queue.SimpleQueue[T | _End] = queue.SimpleQueue()
    room = threading.Semaphore(depth)
    closed = threading.Event()

    def work() -> None:
        end = _End()
        try:
            with closing(items):
                for item in items:
                    room.acquire()
                    if closed.is_set():
                        return
                    ready.put(item)
        except BaseException as error:
            end = _End(error)
        ready.put(end)

    thread = threading.Thread(target=work, name="read-ahead", daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            room.release()
            yield item
        if item.error:
            raise item.error
    finally:
        closed.set()
        room.release()
        thread.join()


class _End:
    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error
