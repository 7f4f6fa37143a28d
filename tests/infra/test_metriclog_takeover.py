"""A process that was given up logs nothing more after its connection to MLflow is restored."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar

import pytest

from infra.tracking.metric_log import ONE_TRY_PER_REQUEST, MetricLogger
from tests.flows.program import wait_for


class Away(BaseHTTPRequestHandler):
    """Answers every request with an error, and records it."""

    asked: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        self.asked.append(self.path)
        self.send_response(503)
        self.end_headers()

    do_GET = do_POST

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    Away.asked = []
    server = HTTPServer(("127.0.0.1", 0), Away)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    for name, value in {**ONE_TRY_PER_REQUEST, "MLFLOW_TRACKING_URI": address}.items():
        monkeypatch.setenv(name, value)
    yield Away.asked
    server.shutdown()
    server.server_close()


@pytest.mark.long
def test_what_waits_is_dropped_when_another_process_has_taken_over_during_an_outage(away: list[str]) -> None:
    metrics = MetricLogger("f00d", is_current=lambda: False)
    metrics.log(1, {"train/loss": 1.0})
    wait_for(lambda: not metrics.unacknowledged(), "the first row to be dropped")
    metrics.log(2, {"train/loss": 0.5})
    assert metrics.close(60.0) == ()
    assert len(away) == 1
