"""Measures what a rank does with the time of each step: waits for images, computes, waits for other ranks."""

import time
from collections import deque
from typing import Any, NamedTuple

import torch

Mark = Any  # seconds, or an event on a GPU's time line


class StepTimes(NamedTuple):
    """Seconds of a step on a rank; 0.0 if not known yet."""

    compute: float = 0.0
    """From the beginning to the last gradient, with the time of waiting for images."""

    data: float = 0.0
    """Waiting for images; 0.0 with a GPU, which may compute while its host waits."""

    exchange: float = 0.0
    """Waiting for the sums of all ranks after this rank's last gradient."""


class StepClock:
    """Measures times on the device's own time line; on a GPU they are known some steps later, without waiting."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Mark] = []
        self._data = 0.0
        self._steps: deque[tuple[list[Mark], float]] = deque()
        self._times = StepTimes()

    def start(self) -> None:
        """Marks the beginning of a step."""
        self._marks, self._data = [self._now()], time.perf_counter()

    def data_ready(self) -> None:
        """Marks that the step's images are there."""
        self._data = 0.0 if self._cuda else time.perf_counter() - self._data

    def computed(self) -> None:
        """Marks the end of the step's computation: its last gradient is computed."""
        self._marks.append(self._now())

    def exchanged(self) -> None:
        """Marks that the sums over all ranks are there."""
        self._marks.append(self._now())
        self._steps.append((self._marks, self._data))

    def times(self) -> StepTimes:
        """Returns the newest known times of a step."""
        while self._steps and _is_over(self._steps[0][0][-1]):
            (start, computed, exchanged), data = self._steps.popleft()
            self._times = StepTimes(_between(start, computed), data, _between(computed, exchanged))
        return self._times

    def _now(self) -> Mark:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def _is_over(mark: Mark) -> bool:
    return isinstance(mark, float) or bool(mark.query())


def _between(start: Mark, end: Mark) -> float:
    """Returns seconds."""
    return float(end - start if isinstance(start, float) else start.elapsed_time(end) / 1000)
