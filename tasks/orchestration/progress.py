"""Shows the progress of long work as one line: next to a bar in a terminal, otherwise in the log, and in Prefect."""

import logging
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal, Protocol
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import TaskRunContext
from prefect.logging import get_run_logger
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, ProgressColumn, Task
from rich.table import Column
from rich.text import Text

from infra.machine import stopping
from infra.machine.background import in_background
from tasks.orchestration.flow_runs import flow_run_id

LOG_SECONDS = 10.0  # between log lines where there is no terminal
MIN_COLUMNS_FOR_BAR = 120  # of a terminal: in a narrower one, the figures of a training need the room
ARTIFACT_SECONDS = 3.0  # between updates of the artifact: each one is a request to Prefect
LAST_REQUEST_SECONDS = 5.0  # that the end of the work waits for such a request

SHORTER = ((" images/s", " img/s"), (" to go", " left"), ("epoch ", ""), (" img/s", "/s"))
"""Replacements that shorten a line for a narrow terminal, one after another until it fits."""

Unit = Literal["bytes", "images", "files", "epochs"]


class Advance(Protocol):
    """Adds `amount` to the work done, from any thread; `note` is shown next to the bar until the next note.

    `waiting` says what happens before work is done, or done again. Until the next call it replaces the note, with the
    seconds since it began, and time to go counts from its end.
    """

    def __call__(self, amount: float, note: str | None = None, *, waiting: str = "") -> None: ...


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

    def advance(amount: float, note: str | None = None, *, waiting: str = "") -> None:
        stopping.check()
        with lock:
            pace.update(amount, note, waiting)
            shown.update(pace)
            if published:
                published.update(pace)

    with shown:
        yield advance
        pace.finished = True
        shown.update(pace)
    if published:
        published.update(pace, last=True)


def run_logger() -> logging.Logger | logging.LoggerAdapter[logging.Logger]:
    """Returns Prefect's logger of the current task or flow run, or a plain logger outside a run."""
    return get_run_logger() if flow_run_id() or TaskRunContext.get() else logging.getLogger("convoy")


class _Pace:
    """Share, speed and remaining time of the work."""

    def __init__(self, total: float | None, unit: Unit) -> None:
        self._total, self._unit = total, unit
        self._began = time.monotonic()
        self._first: tuple[float, float] | None = None  # time and amount when work began
        self._note = self._waiting = ""
        self.done, self.finished = 0.0, False

    def update(self, amount: float, note: str | None, waiting: str) -> None:
        self.done += amount
        self._note = self._note if note is None else note
        if self._first is None or waiting not in ("", self._waiting):
            self._first = (time.monotonic(), self.done)
        self._waiting = waiting

    @property
    def share(self) -> float | None:
        """Share of the work that is done; None if the total is unknown."""
        return min(self.done / self._total, 1.0) if self._total else None

    def line(self) -> str:
        """Returns share, speed, remaining or total time, and the note; or what is waited for, and how long."""
        now = time.monotonic()
        share = "" if self.share is None else f"{self.share:.0%}"
        if self._waiting and self._first and not self.finished:
            seconds = now - self._first[0]
            waited = duration(seconds) if seconds >= 1 else ""
            return ", ".join(filter(None, (share if self.done else "", self._waiting, waited)))
        taken = f"in {duration(now - self._began)}" if self.finished else self._remaining(now)
        return ", ".join(filter(None, (share, self._speed(now - self._began), taken, self._note)))

    def _remaining(self, now: float) -> str:
        """Returns the remaining time, by the speed since the first report: the start of ranks is not repeated."""
        if self._first is None or self._total is None or self.done <= self._first[1]:
            return ""
        left = max(self._total - self.done, 0.0)  # sums of shares can exceed the whole
        return f"{duration(left * (now - self._first[0]) / (self.done - self._first[1]))} to go"

    def _speed(self, seconds: float) -> str:
        if self._unit == "epochs" or not self.done or not seconds:  # ranks measure their own speed
            return ""
        per_second = self.done / seconds
        if self._unit == "bytes":
            return f"{decimal(int(per_second))}/s"
        return f"{per_second:,.0f} {self._unit}/s" if per_second >= 10 else f"{per_second:.1f} {self._unit}/s"


def duration(seconds: float) -> str:
    """Returns a duration in words, as short as it can be."""
    if seconds < 100:
        return f"{max(0.0, seconds):.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 48 * 60 else f"{minutes / 1440:.0f} days"


class _Line(ProgressColumn):
    """Description and pace as one line, made only when it is drawn, in the longest form that fits."""

    def __init__(self, description: str, pace: _Pace) -> None:
        super().__init__(table_column=Column(no_wrap=True, ratio=1))
        self._description, self._pace = description, pace

    def render(self, task: Task) -> "_Line":
        return self

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        line, verb = self._pace.line(), self._description.split(" ")[0]
        forms = [f"{self._description}  {line}", f"{verb}  {line}"]
        for long, short in SHORTER:
            line = line.replace(long, short)
            forms.append(f"{verb}  {line}")
        forms += [line, line := line.replace(" · ", " ")]
        fitting = (form for form in forms if cell_len(form) <= options.max_width)
        yield Text(next(fitting, line), no_wrap=True, overflow="ellipsis")


class _Bar:
    """A bar in a terminal: always one line, however narrow the terminal is."""

    def __init__(self, description: str, total: float | None, pace: _Pace) -> None:
        # What is printed meanwhile goes through this console, which must not break addresses over lines.
        console = Console(stderr=True, emoji=False, soft_wrap=True)
        bar = [BarColumn(bar_width=24)] if console.width >= MIN_COLUMNS_FOR_BAR else []
        self._bars = Progress(*bar, _Line(description, pace), console=console, expand=True)
        self._task = self._bars.add_task("", total=total)

    def __enter__(self) -> None:
        self._bars.start()

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def update(self, pace: _Pace) -> None:
        self._bars.update(self._task, completed=pace.done)


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
    """A progress artifact of the flow run. Only the end of the work waits for Prefect; a failed request is logged."""

    def __init__(self, key: str, description: str) -> None:
        self._key, self._description = key, description
        self._id: UUID | None = None
        self._last = time.monotonic()
        self._request = in_background(partial(self._publish, 0.0, description))

    def update(self, pace: _Pace, *, last: bool = False) -> None:
        if last:
            wait([self._request], LAST_REQUEST_SECONDS)  # an earlier one
        elif time.monotonic() - self._last < ARTIFACT_SECONDS:
            return
        if not self._request.done():
            return
        self._last = time.monotonic()
        now = 100 * (pace.share or 0.0), f"{self._description}: {pace.line()}"
        self._request = in_background(partial(self._publish, *now))
        if last:
            wait([self._request], LAST_REQUEST_SECONDS)

    def _publish(self, progress: float, description: str) -> None:
        try:
            if self._id:
                update_progress_artifact(self._id, progress=progress, description=description)
            else:
                created = create_progress_artifact(progress=progress, key=self._key, description=description)
                assert isinstance(created, UUID)  # not a coroutine, since this is no coroutine
                self._id = created
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
        logger = logging.getLogger(name)
        if not any(isinstance(handler, _TaskLogs) for handler in logger.handlers):  # a program may train again
            logger.addHandler(_TaskLogs(logging.INFO))
