"""Following and cancelling a flow run from outside while Prefect is down or refuses."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from prefect import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Crashed, Running, Scheduled

from flows import deployments
from infra.errors import ServiceError
from infra.tracking import mlflow_runs
from infra.tracking.tags import MLFLOW_RUN
from tests.tasks.leftovers import flow_run_in


class Relay(BaseHTTPRequestHandler):
    """Passes requests on to Prefect, or refuses them while it is `away`."""

    api: ClassVar[str]
    away: ClassVar[bool] = False

    def _pass(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, data = 503, b"{}"
        if not type(self).away:
            request = Request(self.api + self.path, data=body or None, method=self.command)
            request.add_header("Content-Type", "application/json")
            try:
                with urlopen(request) as answer:
                    status, data = answer.status, answer.read()
            except HTTPError as error:
                status, data = error.code, error.read()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PATCH = _pass

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def relay(stack: object, quiet_prefect: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Relay]]:
    """A proxy of the real Prefect that can be switched off, and that the client uses."""

    class Ours(Relay):
        api = PREFECT_API_URL.value().removesuffix("/api")

    monkeypatch.setattr(deployments, "MAX_POLL_SECONDS", 0.05)
    with ThreadingHTTPServer(("127.0.0.1", 0), Ours) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/api"
        with temporary_settings({PREFECT_API_URL: url, PREFECT_CLIENT_MAX_RETRIES: 0}):
            yield Ours
        server.shutdown()


def set_state(run: FlowRun, state: Any) -> None:
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run.id, state, force=True)


def test_an_outage_of_prefect_does_not_end_the_waiting_and_a_crash_names_the_mlflow_run(relay: type[Relay]) -> None:
    run = flow_run_in(Running(), name="retrain")
    with get_client(sync_client=True) as client:
        client.update_flow_run_labels(run.id, {MLFLOW_RUN: "0123abcd"})
    told: list[str] = []

    def tell(line: str) -> None:
        told.append(line)
        if line.startswith("Running") and len(told) == 1:
            relay.away = True
        elif line.startswith("Prefect does not answer"):
            relay.away = False
        else:
            set_state(run, Crashed(message="its process was killed"))

    summary, _ = deployments.follow(run.id, tell)
    assert told == [
        "Running",
        "Prefect does not answer, which does not end the flow run: waiting for it",
        "Running",
        "Crashed: its process was killed",
    ]
    assert (summary.status, summary.exit_status, summary.mlflow_run_id) == ("failed", 1, "0123abcd")


def test_an_outage_without_end_is_one_line(relay: type[Relay], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployments, "MAX_OUTAGE_SECONDS", 0.2)
    run = flow_run_in(Running(), name="retrain")

    def tell(_: str) -> None:
        relay.away = True

    with pytest.raises(ServiceError, match=r"Prefect does not answer .*the flow run may go on without it"):
        deployments.follow(run.id, tell)


def test_a_cancel_that_prefect_refuses_is_not_taken_for_one(
    relay: type[Relay], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flow run that ends between the read of its state and the request to cancel it."""
    run = flow_run_in(Scheduled(), name="retrain")
    refused = {
        "state": None,
        "status": "REJECT",
        "details": {"type": "reject_details", "reason": "it has just ended"},
    }
    really = relay._pass

    def answer(self: Relay) -> None:
        if not self.path.endswith("/set_state"):
            return really(self)
        data = json.dumps(refused).encode()
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    monkeypatch.setattr(relay, "do_POST", answer, raising=False)
    monkeypatch.setattr(mlflow_runs, "run_tags", lambda _: {})
    with pytest.raises(ServiceError, match="it has just ended"):
        deployments.cancel(str(run.id))
