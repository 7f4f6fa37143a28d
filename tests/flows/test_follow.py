"""Following and cancelling a flow run from outside while Prefect is down or refuses."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import yaml
from prefect import flow, get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Completed, Crashed, Running, Scheduled

from flows import deployed_runs, deployments
from infra.errors import ServiceError, UsageError
from infra.tracking import mlflow_runs
from infra.tracking.tags import MLFLOW_RUN, RESUMED_BY
from tests.tasks.leftovers import flow_run_in


class Relay(BaseHTTPRequestHandler):
    """Passes requests on to Prefect, or refuses them while it is `away`."""

    api: ClassVar[str]
    away: ClassVar[bool] = False
    lost: ClassVar[set[str]] = set()
    """Ends of paths; the next answer to each is lost on its way back."""

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
        for end in {end for end in self.lost if self.path.endswith(end)}:
            self.lost.remove(end)
            status, data = 503, b"{}"
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

    monkeypatch.setattr(deployed_runs, "MAX_POLL_SECONDS", 0.05)
    with ThreadingHTTPServer(("127.0.0.1", 0), Ours) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/api"
        with temporary_settings({PREFECT_API_URL: url, PREFECT_CLIENT_MAX_RETRIES: 0}):
            yield Ours
        server.shutdown()


def deploy(name: str, file: Path) -> None:
    """Registers a deployment that no worker serves."""
    entry = {
        "name": name,
        "entrypoint": "flows.retrain.retrain_flow",
        "parameters": {"config": {"dataset": "digits"}},
        "work_pool": {"name": f"{name}-pool"},
    }
    file.write_text(yaml.safe_dump({"name": "convoy", "pull": [], "deployments": [entry]}))
    list(deployments.deploy(file))


def set_state(run: FlowRun, state: Any) -> None:
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run.id, state, force=True)


@pytest.mark.long
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

    summary, _ = deployed_runs.follow(run.id, tell)
    assert told == [
        "Running",
        "Prefect does not answer, which does not end the flow run: waiting for it",
        "Running",
        "Crashed: its process was killed",
    ]
    assert (summary.status, summary.exit_status, summary.mlflow_run_id) == ("failed", 1, "0123abcd")


@pytest.mark.long
def test_an_outage_after_the_last_state_does_not_lose_the_result(relay: type[Relay]) -> None:
    run = flow_run_in(Completed(), name="retrain")
    relay.lost.add("/artifacts/filter")
    told: list[str] = []
    summary, _ = deployed_runs.follow(run.id, told.append)
    assert told == ["Completed", "Prefect does not answer, which does not end the flow run: waiting for it"]
    assert summary.prefect_flow_run_id == str(run.id)


@pytest.mark.long
def test_a_request_whose_answer_was_lost_starts_one_flow_run(relay: type[Relay], tmp_path: Path) -> None:
    deploy("asked", tmp_path / "prefect.yaml")
    relay.lost.add("/create_flow_run")
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 2}):
        started = deployed_runs.start_retraining("asked", ["dataset=digits"], force=True)
    with get_client(sync_client=True) as client:
        found = client.read_deployment_by_name("retrain/asked")
        runs = client.read_flow_runs(deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[found.id])))
    assert not relay.lost
    assert [run.id for run in runs] == [started.id]


@pytest.mark.long
@pytest.mark.parametrize("gives_up", [False, True])
def test_a_dead_flow_run_that_a_worker_will_resume_is_no_failure(
    relay: type[Relay], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gives_up: bool
) -> None:
    monkeypatch.setattr(deployed_runs, "SUCCESSOR_SECONDS", 0.2)  # as if its machine took longer to start again
    deploy("dead", tmp_path / "prefect.yaml")
    with get_client(sync_client=True) as client:
        run = client.create_flow_run_from_deployment(
            client.read_deployment_by_name("retrain/dead").id, state=Crashed(message="its process was killed")
        )
        if gives_up:
            client.update_flow_run_labels(run.id, {RESUMED_BY: "none: it has ended 4 times in a row at step 0"})
    summary, _ = deployed_runs.follow(run.id, lambda _: None)
    expected = ("failed", 1, "its process was killed")
    if not gives_up:
        expected = ("interrupted", 75, "its process was killed; a worker of its kind goes on with it")
    assert (summary.status, summary.exit_status, summary.error) == expected


@pytest.mark.long
def test_a_mistake_that_a_worker_meets_ends_the_command_with_its_status(relay: type[Relay], tmp_path: Path) -> None:
    from tasks.orchestration.failure import failure_told

    @flow(name="retrain")
    def mistaken() -> None:
        with failure_told(minor=True):
            raise UsageError("there is no such folder")

    state = mistaken(return_state=True)
    summary, _ = deployed_runs.follow(state.state_details.flow_run_id, lambda _: None)
    assert (summary.status, summary.exit_status) == ("failed", 2)
    assert "there is no such folder" in (summary.error or "")


@pytest.mark.long
def test_an_outage_without_end_is_one_line(relay: type[Relay], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployed_runs, "MAX_OUTAGE_SECONDS", 0.2)
    run = flow_run_in(Running(), name="retrain")

    def tell(_: str) -> None:
        relay.away = True

    with pytest.raises(ServiceError, match=r"Prefect does not answer .*the flow run may go on without it"):
        deployed_runs.follow(run.id, tell)


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
        deployed_runs.cancel(str(run.id))
