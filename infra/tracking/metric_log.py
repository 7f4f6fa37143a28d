"""Metrics of a running training, sent to MLflow by a thread that outlives the server's outages."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from itertools import islice

import mlflow
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from infra.errors import Outage
from infra.records import Record
from infra.tracking.client import first_line, tracking_uri

logger = logging.getLogger(__name__)

METRICS_A_CALL = 1000  # MLflow's limit
CAPACITY = 100_000  # values waiting for the server, some 20 MB
GATHER = 1.0  # seconds between sends: a training takes many steps a second, a request takes milliseconds
DELIVER_WITHIN = 30.0  # seconds that the server has to take what a training left behind
LONGEST_PAUSE = 30.0  # seconds between tries during an outage
WORTH_ANOTHER_TRY = (401, 403, 408, 429)  # a token or limit may change; other 4xx answers stay as they are

ONE_TRY_A_REQUEST = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
"""For a rank's environment: its MetricLogger tries again by itself, MLflow's retries would delay it."""


class MetricRow(Record, extra="forbid", ser_json_inf_nan="strings"):
    """Metrics logged together.

    `timestamp` (milliseconds) is that of the call to `log`, and stays: MLflow stores one row for equal run,
    name, step, value and timestamp, so a row that is sent again, because its acknowledgement was lost or a
    training resumed, is stored once.
    """

    step: int
    timestamp: int
    values: dict[str, float]
    keep: bool = False
    """Never thinned out, as are the figures of an epoch."""


class MetricLogger:
    """A bounded buffer of metrics and the thread that empties it into one MLflow run.

    `log` neither blocks nor raises, whatever the server does. During an outage rows wait in memory and tries
    are repeated for as long as the process lives. After one, of each metric only steps beyond those that the server has
    are sent: another process may have gone on with the run meanwhile. When more than `capacity` values wait, every
    second of the older half of the rows is dropped, except those logged with `keep`: an outage of any length costs
    detail, first of its beginning, but no epoch's figures. Both ends of an outage are logged.

    Args:
        run_id: the MLflow run.
        backlog: what an earlier process could not deliver (its `unacknowledged()`); sent first.
        resumed: an earlier process went further than this one begins; of each metric only steps that the server
            does not have yet are sent, so that none is there twice.
        capacity: values that may wait.
        is_current: asked after an outage, before anything is sent; False if another process has taken over the run
            meanwhile. What waits is then dropped: the other process logs the same steps. May raise, if it cannot tell.
    """

    def __init__(
        self,
        run_id: str,
        *,
        backlog: Iterable[MetricRow] = (),
        resumed: bool = False,
        capacity: int = CAPACITY,
        is_current: Callable[[], bool] = lambda: True,
    ) -> None:
        self.run_id = run_id
        self._ask_what_is_there, self._is_current = resumed, is_current
        self._superseded = False
        self._there: dict[str, int] = {}  # last step of each metric when we began, as far as it is asked for
        self._capacity = capacity
        self._rows: deque[MetricRow] = deque(backlog)
        self._waiting = sum(len(row.values) for row in self._rows)
        self._in_flight = 0  # rows at the left end that are being sent, and so must stay
        self._thinned = 0  # values, in this outage
        self._failures = 0  # tries, in this outage
        self._closing = False
        self._abandoned = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="metric-logger", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float], *, keep: bool = False) -> None:
        """Take metrics of a step; `keep` those that must survive the longest outage, as an epoch's."""
        row = MetricRow(step=step, timestamp=time.time_ns() // 1_000_000, values=dict(metrics), keep=keep)
        with self._changed:
            self._rows.append(row)
            self._waiting += len(row.values)
            if self._waiting > self._capacity:
                self._thin()
            if len(self._rows) == 1 or self._waiting >= METRICS_A_CALL:  # else the sender need not wake up
                self._changed.notify_all()

    def unacknowledged(self) -> tuple[MetricRow, ...]:
        """The rows that the server has not confirmed yet, oldest first."""
        with self._changed:
            return tuple(self._rows)

    def close(self, timeout: float) -> tuple[MetricRow, ...]:
        """Send what is waiting, for at most `timeout` seconds; returns what the server did not confirm."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._rows, timeout)
            self._abandoned = True
            self._changed.notify_all()
            return tuple(self._rows)

    def _run(self) -> None:
        while batch := self._next_batch():
            delivered = self._send(batch)
            with self._changed:
                self._in_flight = 0
                if delivered:
                    for row in batch:
                        self._rows.popleft()
                        self._waiting -= len(row.values)
                    self._recovered()
                    self._changed.notify_all()
                else:
                    self._pause()

    def _next_batch(self) -> tuple[MetricRow, ...]:
        """Wait for rows and look at one request's worth from the left; empty when it is time to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._rows or self._closing)
            self._changed.wait_for(lambda: self._closing or self._waiting >= METRICS_A_CALL, GATHER)
            if self._abandoned:
                return ()
            batch: list[MetricRow] = []
            room = METRICS_A_CALL
            for row in self._rows:
                room -= len(row.values)
                if batch and room < 0:
                    break
                batch.append(row)
            self._in_flight = len(batch)
            return tuple(batch)

    def _send(self, batch: tuple[MetricRow, ...]) -> bool:
        """Send rows; false if the same is worth another try later."""
        try:
            if self._failures and not self._superseded:
                self._superseded = not self._is_current()
            if self._superseded:
                return True
            metrics = [
                Metric(name, value, row.timestamp, row.step)
                for row in batch
                for name, value in row.values.items()
                if row.step > self._last_step(name)
            ]
            for start in range(0, len(metrics), METRICS_A_CALL):
                mlflow.MlflowClient().log_batch(self.run_id, metrics[start : start + METRICS_A_CALL])
        except MlflowException as error:
            status = error.get_http_status_code()  # type: ignore[no-untyped-call]  # 500 if no answer came
            if 400 <= status < 500 and status not in WORTH_ANOTHER_TRY:
                steps = f"{batch[0].step} to {batch[-1].step}"
                logger.warning("MLflow refused the metrics of steps %s: %s", steps, first_line(error))
                return True  # it would refuse them for ever, and everything behind them would wait
            self._failed(error)
            return False
        except Exception as error:  # training must not stop for a reason nobody has thought of
            self._failed(error)
            return False
        return True

    def _last_step(self, name: str) -> int:
        """The last step of a metric that an earlier process has delivered."""
        if not self._ask_what_is_there:
            return -1
        if name not in self._there:
            history = mlflow.MlflowClient().get_metric_history(self.run_id, name)
            self._there[name] = max((metric.step for metric in history), default=-1)
        return self._there[name]

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        self._ask_what_is_there = True
        self._there.clear()
        if self._failures == 1:
            logger.warning(
                "MLflow at %s does not take metrics; training goes on, and up to %d values wait (%s)",
                tracking_uri(),
                self._capacity,
                first_line(error),
            )

    def _recovered(self) -> None:
        if self._failures:
            lost = f"; {self._thinned} step values were thinned out meanwhile" if self._thinned else ""
            logger.warning("MLflow takes metrics again%s", lost)
        self._failures = self._thinned = 0

    def _pause(self) -> None:
        """Wait until the next try, longer each time, but never long once `close` waits; lock held."""
        closing = self._closing
        self._changed.wait_for(
            lambda: self._abandoned or self._closing is not closing,
            0.5 if closing else min(LONGEST_PAUSE, 2.0 ** min(self._failures - 1, 10)),
        )

    def _thin(self) -> None:
        """Drop every second of the older half of the rows that may go; called with the lock held."""
        free = [
            number
            for number, row in enumerate(islice(self._rows, self._in_flight, None), self._in_flight)
            if not row.keep
        ]
        drop = set(free[: len(free) // 2 : 2])
        gone = sum(len(row.values) for number, row in enumerate(self._rows) if number in drop)
        self._rows = deque(row for number, row in enumerate(self._rows) if number not in drop)
        self._waiting -= gone
        self._thinned += gone


def deliver(run_id: str, rows: Iterable[MetricRow]) -> None:
    """Sends rows that a process could not deliver before its end; a second call sends none of them again.

    Raises:
        Outage: the server did not take all of them.
    """
    if rest := MetricLogger(run_id, backlog=rows, resumed=True).close(DELIVER_WITHIN):
        raise Outage(f"MLflow at {tracking_uri()} does not take {len(rest)} rows of metrics of run {run_id}")
