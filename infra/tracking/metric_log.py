"""Sends the metrics of a running training to MLflow, from a thread that survives the server's outages."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping

import mlflow
from mlflow.entities import Metric

from infra.errors import Outage, counted
from infra.records import Record
from infra.tracking.client import first_line, http_status, is_refusal, tracking_uri

logger = logging.getLogger(__name__)

METRICS_PER_CALL = 1000  # MLflow's limit
BUFFERED_VALUES = 100_000  # some 20 MB
SEND_INTERVAL_SECONDS = 1.0  # a training does many steps per second, a request takes milliseconds
DELIVERY_TIMEOUT_SECONDS = 30.0  # for the rows that a training could not send
MAX_RETRY_SECONDS = 30.0  # between tries during an outage

ONE_TRY_PER_REQUEST = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
"""For a rank's environment: the MetricLogger itself retries, and MLflow's retries would delay it."""


class MetricRow(Record, extra="forbid", ser_json_inf_nan="strings"):
    """Metrics that were logged together.

    `timestamp` (milliseconds) is the time of the call to `log` and never changes: MLflow stores one row for equal run,
    name, step, value and timestamp. So a row that is sent twice, after a lost acknowledgement or a resume, is stored
    once.
    """

    step: int
    timestamp: int
    values: dict[str, float]
    keep: bool = False
    """Whether it is never thinned out, for example because it has the metrics of an epoch."""


class MetricLogger:
    """A bounded buffer of metrics, with a thread that sends them to one MLflow run.

    `log` neither blocks nor raises, whatever the server does. During an outage, rows wait in memory, and sending is
    retried until the process ends. Afterwards, only steps beyond the server's last step of a metric are sent, since
    another process may have continued the run meanwhile. When more than `capacity` values wait, every second row of the
    older half is dropped, except rows logged with `keep`: a long outage costs detail, first of its beginning, but no
    metrics of an epoch. The beginning and the end of an outage are logged.

    Args:
        run_id: the MLflow run.
        backlog: rows that an earlier process could not deliver (its `unacknowledged()`); sent first.
        capacity: values that may wait.
        is_current: called after an outage before anything is sent; returns False if another process has taken over the
            run. The buffer is then dropped, since the other process logs the same steps. May raise if it cannot tell.
    """

    def __init__(
        self,
        run_id: str,
        *,
        backlog: Iterable[MetricRow] = (),
        capacity: int = BUFFERED_VALUES,
        is_current: Callable[[], bool] = lambda: True,
    ) -> None:
        self.run_id = run_id
        self._is_current = is_current
        self._superseded = False
        self._stored: dict[str, int] = {}  # last step of each metric on the server, as far as it was read
        self._capacity = capacity
        self._rows: deque[MetricRow] = deque(backlog)
        self._waiting = sum(len(row.values) for row in self._rows)
        self._in_flight = 0  # rows at the left end that are being sent, so must not be dropped
        self._thinned = 0  # values, in this outage
        self._failures = 0  # tries, in this outage
        self._closing = False
        self._abandoned = False
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="metric-logger", daemon=True).start()

    def log(self, step: int, metrics: Mapping[str, float], *, keep: bool = False) -> None:
        """Buffers metrics of a step; `keep` protects them from thinning out, for example those of an epoch."""
        row = MetricRow(step=step, timestamp=time.time_ns() // 1_000_000, values=dict(metrics), keep=keep)
        with self._changed:
            self._rows.append(row)
            self._waiting += len(row.values)
            if self._waiting > self._capacity:
                self._thin()
            if len(self._rows) == 1 or self._waiting >= METRICS_PER_CALL:  # else the sender need not wake up
                self._changed.notify_all()

    def unacknowledged(self) -> tuple[MetricRow, ...]:
        """Returns the rows that the server has not confirmed, oldest first."""
        with self._changed:
            return tuple(self._rows)

    def close(self, timeout: float) -> tuple[MetricRow, ...]:
        """Sends the buffer within `timeout` seconds; returns the rows that the server did not confirm."""
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
        """Waits for rows and returns those of one request, oldest first; empty when the thread has to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._rows or self._closing)
            self._changed.wait_for(lambda: self._closing or self._waiting >= METRICS_PER_CALL, SEND_INTERVAL_SECONDS)
            if self._abandoned:
                return ()
            batch: list[MetricRow] = []
            values = 0
            for row in self._rows:
                values += len(row.values)
                if batch and values > METRICS_PER_CALL:
                    break
                batch.append(row)
            self._in_flight = len(batch)
            return tuple(batch)

    def _send(self, batch: tuple[MetricRow, ...]) -> bool:
        """Sends rows; returns False if sending them again later may succeed."""
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
            for start in range(0, len(metrics), METRICS_PER_CALL):
                mlflow.MlflowClient().log_batch(self.run_id, metrics[start : start + METRICS_PER_CALL])
        except Exception as error:  # training must not stop because of an unforeseen error
            if is_refusal(http_status(error)):
                steps = f"{batch[0].step} to {batch[-1].step}"
                logger.warning("MLflow refused the metrics of steps %s: %s", steps, first_line(error))
                return True  # a retry would be refused too, and block all later rows
            self._failed(error)
            return False
        return True

    def _last_step(self, name: str) -> int:
        """Returns the last step of a metric on the server; -1 if there is none."""
        if name not in self._stored:
            history = mlflow.MlflowClient().get_metric_history(self.run_id, name)
            self._stored[name] = max((metric.step for metric in history), default=-1)
        return self._stored[name]

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        self._stored.clear()
        if self._failures == 1:
            message = "MLflow at %s does not accept metrics; training continues, and up to %d values wait (%s)"
            logger.warning(message, tracking_uri(), self._capacity, first_line(error))

    def _recovered(self) -> None:
        if self._failures:
            lost = f"; {self._thinned} step values were thinned out meanwhile" if self._thinned else ""
            logger.warning("MLflow accepts metrics again%s", lost)
        self._failures = self._thinned = 0

    def _pause(self) -> None:
        """Waits for the next try, longer each time, but only shortly during `close`. The caller holds the lock."""
        closing = self._closing
        self._changed.wait_for(
            lambda: self._abandoned or self._closing is not closing,
            0.5 if closing else min(MAX_RETRY_SECONDS, 2.0 ** min(self._failures - 1, 10)),
        )

    def _thin(self) -> None:
        """Drops every second row of the older half of those that may be dropped. The caller holds the lock."""
        free = [number for number, row in enumerate(self._rows) if number >= self._in_flight and not row.keep]
        drop = set(free[: len(free) // 2 : 2])
        gone = sum(len(row.values) for number, row in enumerate(self._rows) if number in drop)
        self._rows = deque(row for number, row in enumerate(self._rows) if number not in drop)
        self._waiting -= gone
        self._thinned += gone


def deliver(run_id: str, rows: Iterable[MetricRow]) -> None:
    """Sends rows that an ended process could not deliver; a second call does not store them again.

    Raises:
        Outage: the server did not accept all rows.
    """
    if rest := MetricLogger(run_id, backlog=rows).close(DELIVERY_TIMEOUT_SECONDS):
        raise Outage(
            f"MLflow at {tracking_uri()} does not accept {counted(len(rest), 'row')} of metrics of run {run_id}"
        )
