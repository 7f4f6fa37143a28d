"""Measures how long a rank computes in each step, without the time it waits for other ranks."""

import time
from collections import deque

import torch


class ComputeClock:
    """Measures times on the device's own time line; on a GPU a time is known some steps later, without waiting."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._began = 0.0
        self._spans: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._start: torch.cuda.Event | None = None
        self._seconds = 0.0

    def start(self) -> None:
        """Marks the beginning of a step."""
        if self._cuda:
            self._start = _event()
        else:
            self._began = time.perf_counter()

    def stop(self) -> None:
        """Marks the end of the step's computation: its last gradient is computed."""
        if not self._cuda:
            self._seconds = time.perf_counter() - self._began
        elif self._start is not None:
            self._spans.append((self._start, _event()))

    def seconds(self) -> float:
        """Returns the newest known time of a step; 0.0 before the first."""
        while self._spans and self._spans[0][1].query():  # type: ignore[no-untyped-call]
            start, end = self._spans.popleft()
            self._seconds = start.elapsed_time(end) / 1000
        return self._seconds


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
