"""Logs the use of a training's machine as metrics of its run."""

import logging
import threading
import time
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from requests import RequestException

from infra.tracking.client import first_line
from infra.tracking.metric_log import MetricLogger

logger = logging.getLogger(__name__)


class SystemMetrics:
    """Logs the use of processors, memory, disk, network and GPUs of this machine as metrics `system/...` of a run.

    MLflow's monitor measures, but the run's MetricLogger sends the values, since MLflow's own loop ends for good at the
    first request that fails. The step is the time since the run began, in intervals, so it continues after a resume.
    No failure here affects the training.

    Args:
        metrics: the run's logger.
        interval: seconds between measurements; each value describes that span of time.
    """

    def __init__(self, metrics: MetricLogger, *, interval: float = 10.0) -> None:
        self._metrics = metrics
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system-metrics", daemon=True)

    def start(self) -> None:
        """Starts measuring."""
        self._thread.start()

    def stop(self) -> None:
        """Stops measuring; call it before the MetricLogger's `close`."""
        self._stop.set()
        self._thread.join(self._interval)  # it may be waiting for the server

    def _run(self) -> None:
        try:
            # It would log at every start that there is no GPU.
            logging.getLogger(SystemMetricsMonitor.__module__).setLevel(logging.WARNING)
            monitor: Any = SystemMetricsMonitor(self._metrics.run_id)  # type: ignore[no-untyped-call]
            monitor.collect_metrics()  # processor use is counted from the first call
            began, before = self._began(), -1
            while began is not None:
                last = self._stop.wait(self._interval)  # a training shorter than the interval is measured too
                for probe in monitor.monitors:
                    probe.clear_metrics()
                monitor.collect_metrics()
                values = monitor.aggregate_metrics().items()
                step = int((time.time() - began) / self._interval)
                if step > before:  # a stop may come within the interval of the last values
                    self._metrics.log(step, {f"system/{name}": float(value) for name, value in values})
                before = step
                if last:
                    return
        except Exception as error:
            logger.warning("system metrics stop: %s", first_line(error))

    def _began(self) -> float | None:
        """Returns the run's start in seconds since 1970; None if `stop` is called before the server answers."""
        while True:
            try:
                return float(mlflow.MlflowClient().get_run(self._metrics.run_id).info.start_time) / 1000
            except (MlflowException, RequestException):
                if self._stop.wait(self._interval):
                    return None
