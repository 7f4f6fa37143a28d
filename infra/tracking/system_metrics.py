"""How busy the machine of a training is, as metrics of its run."""

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
    """Use of processors, memory, disk, network and GPUs of this machine, as metrics `system/...` of a run.

    MLflow's own monitor measures; the figures go through the run's MetricLogger, since MLflow's own loop ends
    for good at the first request that fails. The step is the time since the run began, in intervals, so it
    goes on after a resume. No failure here reaches training.

    Args:
        metrics: where the figures go.
        interval: seconds between measurements; each figure is about that span of time.
    """

    def __init__(self, metrics: MetricLogger, *, interval: float = 10.0) -> None:
        self._metrics = metrics
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system-metrics", daemon=True)

    def start(self) -> None:
        """Begin to measure."""
        self._thread.start()

    def stop(self) -> None:
        """Stop measuring; call it before the MetricLogger's `close`."""
        self._stop.set()
        self._thread.join(self._interval)  # it may be asking the server something

    def _run(self) -> None:
        try:
            # It would say at every start that there is no GPU.
            logging.getLogger(SystemMetricsMonitor.__module__).setLevel(logging.WARNING)
            monitor: Any = SystemMetricsMonitor(self._metrics.run_id)  # type: ignore[no-untyped-call]
            monitor.collect_metrics()  # processor use is counted from the first look
            began, before = self._began(), -1
            while began is not None:
                last = self._stop.wait(self._interval)  # a training shorter than the interval is measured too
                for probe in monitor.monitors:
                    probe.clear_metrics()
                monitor.collect_metrics()
                figures = monitor.aggregate_metrics().items()
                step = int((time.time() - began) / self._interval)
                if step > before:  # when asked to stop, it may still be the interval of the last figures
                    self._metrics.log(step, {f"system/{name}": float(value) for name, value in figures})
                before = step
                if last:
                    return
        except Exception as error:
            logger.warning("system metrics stop: %s", first_line(error))

    def _began(self) -> float | None:
        """When the run began, in seconds since 1970; None if it is time to stop before the server says so."""
        while True:
            try:
                return float(mlflow.MlflowClient().get_run(self._metrics.run_id).info.start_time) / 1000
            except (MlflowException, RequestException):
                if self._stop.wait(self._interval):
                    return None
