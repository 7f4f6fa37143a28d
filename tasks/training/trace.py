"""Traces some steps of rank 0 with PyTorch's profiler."""

from pathlib import Path

from torch.profiler import profile, schedule

SKIPPED_STEPS = 3  # at the start, in which memory is allocated and kernels are chosen


class Trace:
    """Records what the host, and a GPU, do in some steps; https://ui.perfetto.dev shows the file.

    Args:
        steps: number of steps to record, after the first ones.
        path: where the trace is written, compressed, after the last of these steps or by `close`.
    """

    def __init__(self, steps: int, path: Path) -> None:
        self._left = SKIPPED_STEPS + 1 + steps
        self._path = path
        self._profile = profile(
            schedule=schedule(wait=SKIPPED_STEPS, warmup=1, active=steps, repeat=1), on_trace_ready=self._write
        )
        self._profile.start()

    def step_done(self) -> None:
        """Counts a step."""
        if self._left:
            self._profile.step()
            self._left -= 1
            if not self._left:
                self._profile.stop()

    def close(self) -> None:
        """Ends the recording, if the training has fewer steps."""
        if self._left:
            self._left = 0
            self._profile.stop()

    def _write(self, finished: profile) -> None:
        finished.export_chrome_trace(str(self._path))
