"""Progress of long work: one line, beside a bar in a terminal, in the log now and then elsewhere, and in Prefect."""

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

LOG_EVERY = 10.0  # seconds between log lines where there is no terminal
WIDE = 100  # columns of a terminal that has room for a bar
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
        published.update(pace, at_once=True)


def run_logger() -> logging.Logger | logging.LoggerAdapter[logging.Logger]:
    """Prefect's logger of the task or flow run that this is, or a plain one outside of any."""
    if flow_run_id() or TaskRunContext.get():
        return get_run_logger()
    return logging.getLogger("convoy")


class _Pace:
    """How far the work is, how fast it goes, and how long it will take."""

    def __init__(self, total: float | None, unit: Unit) -> None:
        self._total, self._unit = total, unit
        self._began = time.monotonic()
        self._first: tuple[float, float] | None = None  # the time of the first news, and what was done by then
        self._note = ""
        self.done, self.finished = 0.0, False

    def update(self, amount: float, note: str | None) -> None:
        self.done += amount
        self._note = self._note if note is None else note
        self._first = self._first or (time.monotonic(), self.done)

    @property
    def share(self) -> float | None:
        """Of the whole; None if that is not known."""
        return min(self.done / self._total, 1.0) if self._total else None

    def line(self) -> str:
        """For people: share, speed, time to go or taken, and the note."""
        now = time.monotonic()
        share = "" if self.share is None else f"{self.share:.0%}"
        time_said = f"in {_duration(now - self._began)}" if self.finished else self._to_go(now)
        return ", ".join(filter(None, (share, self._speed(now - self._began), time_said, self._note)))

    def _to_go(self, now: float) -> str:
        """Counted from the first news: what comes before, such as the start of ranks, is not repeated."""
        if self._first is None or self._total is None or self.done <= self._first[1]:
            return ""
        left = max(self._total - self.done, 0.0)  # sums of shares can exceed the whole
        return f"{_duration(left * (now - self._first[0]) / (self.done - self._first[1]))} to go"

    def _speed(self, seconds: float) -> str:
        if self._unit == "epochs" or not self.done or not seconds:  # the ranks measure theirs themselves
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
    """The pace as text, made when it is drawn rather than at each step of the work."""

    def __init__(self, pace: _Pace) -> None:
        super().__init__(table_column=_column(ratio=1))
        self._pace = pace

    def render(self, task: Task) -> Text:
        return Text(self._pace.line())


class _Bar:
    """One line, however narrow the terminal is."""

    def __init__(self, description: str, total: float | None, pace: _Pace) -> None:
        console = Console(stderr=True, emoji=False)
        columns = [
            TextColumn("{task.description}", markup=False, table_column=_column()),  # it names data sets
            *([BarColumn(bar_width=24)] if console.width >= WIDE else []),
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
        if pace.finished or time.monotonic() - self._last >= LOG_EVERY:
            self._last = time.monotonic()
            self._logger.info("%s: %s", self._description, pace.line())


class _Artifact:
    """A progress artifact of the flow run; what Prefect cannot take is not worth failing for."""

    def __init__(self, key: str, description: str) -> None:
        self._description = description
        self._last = time.monotonic()
        created = create_progress_artifact(progress=0.0, key=key, description=description)
        assert isinstance(created, UUID)  # not a coroutine, since we are not in one
        self._id = created

    def update(self, pace: _Pace, *, at_once: bool = False) -> None:
        if at_once or time.monotonic() - self._last >= ARTIFACT_EVERY:
            self._last = time.monotonic()
            said = f"{self._description}: {pace.line()}"
            try:
                update_progress_artifact(self._id, progress=100 * (pace.share or 0.0), description=said)
            except Exception as error:
                run_logger().debug("the progress artifact was not updated: %s", error)


class _TaskLogs(logging.Handler):
    """Prints what our tasks log; Prefect's own lines, and its tracebacks, are for its UI."""

    def emit(self, record: logging.LogRecord) -> None:
        if Path(record.pathname).is_relative_to(Path(__file__).parents[1]):
            print(self.format(record), file=sys.stderr)  # looked up now: a progress bar puts itself in between


def show_task_logs() -> None:
    """Have tasks' log lines on standard error, for flows that run in this process."""
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addHandler(_TaskLogs(logging.INFO))
