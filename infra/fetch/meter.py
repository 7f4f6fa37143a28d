"""Counts the bytes that several threads transfer, and stops them."""

import threading

from infra.machine.files import OnBytes


class TransferStopped(Exception):
    """Another thread failed, or the user interrupted the work."""


class Meter:
    """Reports one file's progress; the reported bytes add up to its size, also after resumed and repeated transfers."""

    def __init__(self, size: int, on_bytes: OnBytes, stop: threading.Event | None = None) -> None:
        self._size = size
        self._on_bytes = on_bytes
        self._stop = stop
        self._lock = threading.Lock()
        self._reported = 0

    def advance_to(self, share: float) -> None:
        """Reports that this share of the file has arrived (0..1); a lower share than before is ignored.

        Raises:
            TransferStopped: `stop` is set.
        """
        if self._stop and self._stop.is_set():
            raise TransferStopped
        position = int(self._size * min(share, 1.0))
        with self._lock:
            if position > self._reported:
                self._on_bytes(position - self._reported)
                self._reported = position

    def byte_counter(self, total: int) -> OnBytes:
        """Returns a function that any thread calls with the bytes just moved, `total` in all."""
        here = 0
        lock = threading.Lock()

        def add(count: int) -> None:
            nonlocal here
            with lock:
                here += count
                share = here / max(total, 1)
            self.advance_to(share)

        return add
