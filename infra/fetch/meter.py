"""Counting bytes that several threads move, and stopping them."""

import threading

from infra.machine.files import OnBytes


class Unwanted(Exception):
    """Another thread failed, or the user interrupted: this one's work is no longer wanted."""


class Meter:
    """Reports one file's progress; the total comes out right after resumed and repeated transfers."""

    def __init__(self, size: int, on_bytes: OnBytes, stop: threading.Event) -> None:
        self._size = size
        self._on_bytes = on_bytes
        self._stop = stop
        self._lock = threading.Lock()
        self._reported = 0

    def at(self, share: float) -> None:
        """This share of the file is here (0..1); going back is not reported.

        Raises:
            Unwanted: the work is no longer wanted.
        """
        if self._stop.is_set():
            raise Unwanted
        position = int(self._size * min(share, 1.0))
        with self._lock:
            if position > self._reported:
                self._on_bytes(position - self._reported)
                self._reported = position

    def adding_up(self, total: int) -> OnBytes:
        """A function that is told of bytes as they come, from any thread, until `total` are here."""
        here = 0
        lock = threading.Lock()

        def moved(count: int) -> None:
            nonlocal here
            with lock:
                here += count
                share = here / max(total, 1)
            self.at(share)

        return moved
