"""Shows the progress of long work as one line: next to a bar in a terminal, otherwise in the log, and in Prefect."""

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
from prefect.context import TaskRunContext
from prefect.logging import get_run_logger
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from infra.machine import stopping
from tasks.orchestration.flow_runs import flow_run_id

LOG_SECONDS = 10.0  # between log lines where there is no terminal
MIN_COLUMNS_FOR_BAR = 100  # of a terminal
ARTIFACT_SECONDS = 3.0  # between updates of the artifact: each one is a request to Prefect

Unit = Literal["bytes", "images", "files", "epochs"]


class Advance(Protocol):
    """Adds `amount` to the work done, from any thread; `note` is shown next to the bar until the next note."""

    def __call__(self, amount: float, note: str | None = None) -> None: ...


@contextmanager
def progress(description: str, total: float | None, *, unit: Unit, artifact: str | None = None) -> Iterator[Advance]:
    """Yields a function that reports work done; it raises Stopped if a signal asks this process to end.

    Args:
        description: shown to people: "Downloading fashion-mnist".
        total: amount of work, in `unit`; None if unknown.
        unit: of `total` and of all amounts.
        artifact: key (`a-z0-9-`) of a Prefect progress artifact to update, or None.
    """
    pace = _Pace(total, unit)
    shown = _Bar(description, total, pace) if sys.stderr.isatty() else _LogLines(description)
    published = _Artifact(artifact, description) if artifact and total and flow_run_id() else None
    lock = threading.Lock()

    def advance(amount: float, note: str | None = None) -> None:
        stopping.check()
        with lock:
            pace.update(amount, note)
            shown.update(pace)
            if published:
                published.update(pace)

    with shown:
        yield advance
        pace.finished = True
        shown.update(pace)
    if published:
        published.update(pace, force=True)


def run_logger() -> logging.Logger | logging.LoggerAdapter[logging.Logger]:
    """Returns Prefect's logger of the current task or flow run, or a plain logger outside a run."""
    return get_run_logger() if flow_run_id() or TaskRunContext.get() else logging.getLogger("convoy")


class _Pace:
    """Share, speed and remaining time of the work."""

    def __init__(self, total: float | None, unit: Unit) -> None:
        self._total, self._unit = total, unit
        self._began = time.monotonic()
        self._first: tuple[float, float] | None = None  # time and amount at the first report
        self._note = ""
        self.done, self.finished = 0.0, False

    def update(self, amount: float, note: str | None) -> None:
        self.done += amount
        self._note = self._note if note is None else note
        self._first = self._first or (time.monotonic(), self.done)

    @property
    def share(self) -> float | None:
        """Share of the work that is done; None if the total is unknown."""
        return min(self.done / self._total, 1.0) if self._total else None

    def line(self) -> str:
        """Returns share, speed, remaining or total time, and the note."""
        now = time.monotonic()
        share = "" if self.share is None else f"{self.share:.0%}"
        duration = f"in {_duration(now - self._began)}" if self.finished else self._remaining(now)
        return ", ".join(filter(None, (share, self._speed(now - self._began), duration, self._note)))

    def _remaining(self, now: float) -> str:
        """Returns the remaining time, by the speed since the first report: the start of ranks is not repeated."""
        if self._first is None or self._total is None or self.done <= self._first[1]:
            return ""
        left = max(self._total - self.done, 0.0)  # sums of shares can exceed the whole
        return f"{_duration(left * (now - self._first[0]) / (self.done - self._first[1]))} to go"

    def _speed(self, seconds: float) -> str:
        if self._unit == "epochs" or not self.done or not seconds:  # ranks measure their own speed
            return ""
        per_second = self.done / seconds
        if self._unit == "bytes":
            return f"{decimal(int(per_second))}/s"
        return f"{per_second:,.0f} {self._unit}/s" if per_second >= 10 else f"{per_second:.1f} {self._unit}/s"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


class _Line(ProgressColumn):
    """The pace as text, made only when it is drawn."""

    def __init__(self, pace: _Pace) -> None:
        super().__init__(table_column=_column(ratio=1))
        self._pace = pace

    def render(self, task: Task) -> Text:
        return Text(self._pace.line())


class _Bar:
    """A bar in a terminal: always one line, however narrow the terminal is."""

    def __init__(self, description: str, total: float | None, pace: _Pace) -> None:
        console = Console(stderr=True, emoji=False)
        columns = [
            TextColumn("{task.description}", markup=False, table_column=_column()),  # names of data sets are no markup
            *([BarColumn(bar_width=24)] if console.width >= MIN_COLUMNS_FOR_BAR else []),
            _Line(pace),
        ]
        self._bars = Progress(*columns, console=console, expand=True)
        self._task = self._bars.add_task(description, total=total)

    def __enter__(self) -> None:
        self._bars.start()

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def update(self, pace: _Pace) -> None:
        self._bars.update(self._task, completed=pace.done)


def _column(ratio: int | None = None) -> Column:
    return Column(no_wrap=True, overflow="ellipsis", ratio=ratio)


class _LogLines:
    def __init__(self, description: str) -> None:
        self._description = description
        self._logger = run_logger()
        self._last = time.monotonic()

    def __enter__(self) -> None:
        self._logger.info("%s …", self._description)

    def __exit__(self, *_: object) -> None: ...

    def update(self, pace: _Pace) -> None:
        if pace.finished or time.monotonic() - self._last >= LOG_SECONDS:
            self._last = time.monotonic()
            self._logger.info("%s: %s", self._description, pace.line())


class _Artifact:
    """A progress artifact of the flow run; a failed update is only logged."""

    def __init__(self, key: str, description: str) -> None:
        self._description = description
        self._last = time.monotonic()
        created = create_progress_artifact(progress=0.0, key=key, description=description)
        assert isinstance(created, UUID)  # not a coroutine, since this is no coroutine
        self._id = created

    def update(self, pace: _Pace, *, force: bool = False) -> None:
        if force or time.monotonic() - self._last >= ARTIFACT_SECONDS:
            self._last = time.monotonic()
            description = f"{self._description}: {pace.line()}"
            try:
                update_progress_artifact(self._id, progress=100 * (pace.share or 0.0), description=description)
            except Exception as error:
                run_logger().debug("the progress artifact was not updated: %s", error)


class _TaskLogs(logging.Handler):
    """Prints log lines of Convoy's tasks; Prefect's own lines and tracebacks are shown in its UI only."""

    def emit(self, record: logging.LogRecord) -> None:
        if Path(record.pathname).is_relative_to(Path(__file__).parents[1]):
            print(self.format(record), file=sys.stderr)  # read at each call: a progress bar replaces sys.stderr


def show_task_logs() -> None:
    """Prints tasks' log lines to standard error, for flows that run in this process."""
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addHandler(_TaskLogs(logging.INFO))
