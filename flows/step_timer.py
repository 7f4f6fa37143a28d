"""The times of a flow's steps."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

Output = TypeVar("Output")


class StepTimer:
    """Measures the seconds of each step: a call ends a step and returns its output."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()
        self.seconds: dict[str, float] = {}

    def __call__(self, step: str, output: Output) -> Output:
        now = time.monotonic()
        self.seconds[step], self._last = round(now - self._last, 3), now
        return output

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Leaves out the time of the block."""
        since = time.monotonic()
        try:
            yield
        finally:
            waited = time.monotonic() - since
            self._began, self._last = self._began + waited, self._last + waited

    @property
    def total(self) -> float:
        return round(time.monotonic() - self._began, 3)
