"""Progress of long work: a bar in a terminal, a log line now and then elsewhere, and an artifact in Prefect's UI."""

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import FlowRunContext, TaskRunContext
from prefect.logging import get_run_logger
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from infra import stopping

LOG_EVERY = 15.0  # seconds between log lines where there is no terminal
ARTIFACT_EVERY = 3.0  # seconds between updates of the artifact: each one is a request to Prefect

Unit = Literal["bytes", "images", "files", "epochs"]


class Advance(Protocol):
    """Say that `amount` more is done, from any thread; `note` stays beside the bar until the next one."""

    def __call__(self, amount: float, note: str | None = None) -> None: ...


@contextmanager
def progress(description: str, total: float | None, *, unit: Unit, artifact: str | None = None) -> Iterator[Advance]:
    """Yields a function that is told what has been done; it raises Stopped if a signal asks this process to end.

    Args:
        description: what is being done, for people: "Downloading fashion-mnist".
        total: how much there is to do, in `unit`; None if unknown.
        unit: what is counted.
        artifact: key (`a-z0-9-`) of a Prefect progress artifact to keep up to date, or None for none.
    """
    shown = _Bar(description, total, unit) if sys.stderr.isatty() else _LogLines(description, total, unit)
    published = _Artifact(artifact, description, total) if artifact and total and FlowRunContext.get() else None
    lock = threading.Lock()
    done = 0.0

    def advance(amount: float, note: str | None = None) -> None:
        nonlocal done
        stopping.check()
        with lock:
            done += amount
            shown.update(done, note)
            if published:
                published.update(done)

    with shown:
        yield advance
    if published:
        published.update(done, at_once=True)


def run_logger() -> logging.Logger | logging.LoggerAdapter[logging.Logger]:
    """Prefect's logger of the task or flow run that this is, or a plain one outside of any."""
    if FlowRunContext.get() or TaskRunContext.get():
        return get_run_logger()
    return logging.getLogger("convoy")


class _Amount(ProgressColumn):
    """`12.3 MB/s` or `3 012 images/s`."""

    def __init__(self, unit: Unit) -> None:
        self._unit = unit
        super().__init__()

    def render(self, task: Task) -> Text:
        return Text(_rate(task.finished_speed or task.speed, self._unit), style="progress.data.speed")


class _Bar:
    def __init__(self, description: str, total: float | None, unit: Unit) -> None:
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),  # it names data sets
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            _Amount(unit),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}", markup=False),
            console=Console(stderr=True, emoji=False),
        )
        self._note = ""
        self._task = self._bars.add_task(description.ljust(28), total=total, note="")

    def __enter__(self) -> None:
        self._bars.start()

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def update(self, done: float, note: str | None) -> None:
        self._note = self._note if note is None else note
        self._bars.update(self._task, completed=done, note=self._note)


class _LogLines:
    def __init__(self, description: str, total: float | None, unit: Unit) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._logger = run_logger()
        self._started = self._last = time.monotonic()
        self._done, self._note = 0.0, ""

    def __enter__(self) -> None:
        self._logger.info("%s …", self._description)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._log()

    def update(self, done: float, note: str | None) -> None:
        self._done, self._note = done, self._note if note is None else note
        if time.monotonic() - self._last >= LOG_EVERY:
            self._last = time.monotonic()
            self._log()

    def _log(self) -> None:
        seconds = time.monotonic() - self._started
        share = f"{self._done / self._total:.0%}, " if self._total else ""
        rate = _rate(self._done / seconds if seconds else None, self._unit)
        self._logger.info("%s: %s%s in %.0f s %s", self._description, share, rate, seconds, self._note)


class _Artifact:
    """A progress artifact of the flow run; what Prefect cannot take is not worth failing for."""

    def __init__(self, key: str, description: str, total: float) -> None:
        self._total = total
        self._last = time.monotonic()
        created = create_progress_artifact(progress=0.0, key=key, description=description)
        assert isinstance(created, UUID)  # not a coroutine, since we are not in one
        self._id = created

    def update(self, done: float, *, at_once: bool = False) -> None:
        if at_once or time.monotonic() - self._last >= ARTIFACT_EVERY:
            self._last = time.monotonic()
            percent = min(100.0, 100 * done / self._total)
            try:
                update_progress_artifact(self._id, progress=percent)
            except Exception as error:
                run_logger().debug("the progress artifact was not updated: %s", error)


def _rate(per_second: float | None, unit: Unit) -> str:
    if not per_second:
        return ""
    if unit == "bytes":
        return f"{decimal(int(per_second))}/s"
    return f"{per_second:,.0f} {unit}/s" if per_second >= 10 else f"{per_second:.1f} {unit}/s"


class _TaskLogs(logging.Handler):
    """Prints what our tasks log; Prefect's own lines, and its tracebacks, are for its UI."""

    def emit(self, record: logging.LogRecord) -> None:
        if Path(record.pathname).is_relative_to(Path(__file__).parent):
            print(self.format(record), file=sys.stderr)  # looked up now: a progress bar puts itself in between


def show_task_logs() -> None:
    """Have tasks' log lines on standard error, for flows that run in this process."""
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addHandler(_TaskLogs(logging.INFO))
