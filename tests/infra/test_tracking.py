"""Runs and metrics against a real MLflow server, which is also stopped and started again."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import mlflow
import pytest
from mlflow.artifacts import load_text
from mlflow.entities import Metric
from mlflow.tracking import MlflowClient
from pydantic import TypeAdapter

from infra.errors import Outage, ServiceError, UsageError
from infra.stack.credentials import ensure_certificate
from infra.tracking import mlflow_runs
from infra.tracking.client import check_server, mlflow_client, tracking_uri
from infra.tracking.metric_log import MetricLogger, MetricRow, deliver
from infra.tracking.system_metrics import SystemMetrics
from tests.infra.webserver import Fault, web_server

PATIENCE = 60.0  # seconds until a wait counts as a failure


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


@pytest.fixture
def run_id(stack: object, request: pytest.FixtureRequest) -> str:
    return mlflow_runs.start_run("tracking-tests", request.node.name, {}, {})


def history(run_id: str, metric: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in MlflowClient().get_metric_history(run_id, metric)]


def test_run_carries_params_tags_and_dataset(stack: object) -> None:
    params = {f"network.option{number}": number for number in range(120)}
    digest = "ab12" * 16
    run_id = mlflow_runs.start_run("tracking-tests", "whole", {**params, "unset": None, "lr": 0.1}, {"a": "1"})
    mlflow_runs.set_tags(run_id, {"a": "2", "b": "3"})
    mlflow_runs.log_dataset(run_id, "digits", digest, f"s3://convoy/datasets/{digest}/manifest.json")
    mlflow_runs.log_metrics(run_id, {"test/accuracy": 0.5})
    mlflow_runs.log_text(run_id, "report/evaluation.json", '{"accuracy": 0.5}')
    mlflow_runs.end_run(run_id, "FINISHED")

    run = MlflowClient().get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {name: str(value) for name, value in params.items()} | {
        "unset": "None",
        "lr": "0.1",
    }
    assert (run.data.tags["a"], run.data.tags["b"]) == ("2", "3")
    assert run.data.metrics == {"test/accuracy": 0.5}
    assert run.inputs is not None
    (used,) = run.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("digits", digest[:36])
    assert {tag.key: tag.value for tag in used.tags} == {
        "mlflow.data.context": "training",
        "convoy.digest": digest,
    }
    assert json.loads(used.dataset.source)["uri"].endswith(f"{digest}/manifest.json")
    assert load_text(f"runs:/{run_id}/report/evaluation.json") == '{"accuracy": 0.5}'


def test_run_url_names_experiment_and_run(run_id: str) -> None:
    experiment = MlflowClient().get_run(run_id).info.experiment_id
    server, training = mlflow.get_tracking_uri(), "workflowType=machine_learning"
    assert mlflow_runs.run_url(run_id) == f"{server}/#/experiments/{experiment}/runs/{run_id}?{training}"
    assert mlflow_runs.run_url(run_id, "artifacts").endswith(f"/runs/{run_id}/artifacts?{training}")
    assert mlflow_runs.runs_url(run_id).endswith(f"/{experiment}/runs?{training}&viewStateShareKey=convoy")


def test_experiment_that_others_have_created_gets_the_columns() -> None:
    created = MlflowClient().create_experiment("by hand")
    for _ in range(2):
        mlflow_runs.start_run("by hand", "first", {}, {})
    tags = MlflowClient().get_experiment(created).tags
    assert json.loads(tags["mlflow.sharedViewState.convoy"])["selectedColumns"][0] == "metrics.`test/accuracy`"


@pytest.mark.parametrize(
    ("variable", "value", "complaint"),
    [
        ("HOME", "/", "certificate verify failed"),
        ("MLFLOW_TRACKING_SERVER_CERT_PATH", "/nonexistent.pem", "/nonexistent.pem"),
        ("MLFLOW_TRACKING_SERVER_CERT_PATH", "CERTIFICATE", None),
        ("MLFLOW_TRACKING_INSECURE_TLS", "true", None),
        ("REQUESTS_CA_BUNDLE", "CERTIFICATE", None),
    ],
)
@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
def test_server_is_checked_with_the_certificates_that_mlflow_uses(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, value: str, complaint: str | None
) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    ensure_certificate(certificate, key)
    monkeypatch.setenv(variable, value.replace("CERTIFICATE", str(certificate)))
    with web_server((certificate, key)) as server:
        server.files["/health"] = b"OK"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
        with pytest.raises(Outage, match=complaint) if complaint else nullcontext():
            check_server()
        assert len(server.gets("/health")) == (not complaint)


def test_password_in_the_servers_address_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:hidden@127.0.0.1:9")
    with pytest.raises(ServiceError) as failure:
        check_server()
    assert tracking_uri() == "http://127.0.0.1:9"
    assert "hidden" not in str(failure.value)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ServiceError, match=r"API request to http://127.0.0.1:9/api") as failure, mlflow_client("ask"):
        MlflowClient().search_experiments()
    assert "hidden" not in str(failure.value)


def test_deleted_experiment_is_the_users_to_restore(stack: object) -> None:
    MlflowClient().delete_experiment(MlflowClient().create_experiment("tracking-tests-deleted"))
    with pytest.raises(UsageError, match=r"tracking-tests-deleted.*was deleted"):
        mlflow_runs.start_run("tracking-tests-deleted", "run", {}, {})


def test_refused_params_leave_no_open_run(stack: object) -> None:
    with pytest.raises(ServiceError, match=r"(failed|refused) to start a run") as failure:
        mlflow_runs.start_run("tracking-tests-refused", "run", {"not?a name": 1}, {})
    assert "\n" not in str(failure.value)
    experiment = MlflowClient().get_experiment_by_name("tracking-tests-refused")
    assert experiment is not None
    assert [run.info.status for run in MlflowClient().search_runs([experiment.experiment_id])] == ["FAILED"]


def test_runs_of_all_experiments_are_found_page_by_page(stack: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_runs, "EXPERIMENTS_PER_CALL", 1)
    made = {mlflow_runs.start_run(f"page {number}", "run", {}, {"paged": "x"}) for number in range(3)}
    assert {run.run_id for run in mlflow_runs.search_runs("paged")} == made
    assert {run.run_id for run in mlflow_runs.search_runs("paged", limit=9)} == made
    for run_id in made:
        mlflow_runs.end_run(run_id, "FINISHED")


def test_server_that_is_down_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch, free_address: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", free_address)
    with pytest.raises(ServiceError, match=f"{free_address} does not answer") as failure:
        mlflow_runs.start_run("experiment", "run", {}, {})
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("fault", "kind", "complaint"),
    [
        ("401", ServiceError, "does not let you look: .*MLFLOW_TRACKING_TOKEN"),
        ("403", ServiceError, "does not let you look: "),
        ("404", ServiceError, "refused to look: 404"),
        ("413", ServiceError, "refused to look: 413"),
        ("429", Outage, "failed to look: "),
        ("503", Outage, "failed to look: "),
    ],
)
def test_an_answer_about_artifacts_is_an_outage_only_if_it_may_change(
    fault: Fault, kind: type[ServiceError], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with web_server() as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
        run = {"info": {"run_id": "a" * 32, "artifact_uri": "mlflow-artifacts:/0/a/artifacts"}}
        server.files["/api/2.0/mlflow/runs/get"] = json.dumps({"run": run}).encode()
        server.files[artifacts := "/api/2.0/mlflow-artifacts/artifacts"] = b""
        server.faults[artifacts] = [fault]
        with pytest.raises(ServiceError, match=complaint) as failure, mlflow_client("look") as client:
            client.list_artifacts("a" * 32)
    assert type(failure.value) is kind


def test_a_download_that_failed_is_an_outage_though_mlflow_calls_the_artifact_missing(
    run_id: str, tmp_path: Path
) -> None:
    with pytest.raises(Outage, match="failed to fetch report of run"):
        mlflow_runs.fetch_artifacts(run_id, "report", tmp_path)


def test_an_address_where_no_mlflow_is_and_one_that_its_client_refuses_are_no_outages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with web_server() as server:
        for address, reason in ((server.url, "404"), ("nonsense://mlflow", "unsupported URI")):
            monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
            with pytest.raises(ServiceError, match=f"refused to find run .*{reason}") as failure:
                mlflow_runs.run_status("a" * 32)
            assert type(failure.value) is ServiceError


def test_metrics_arrive_once_each_and_in_order(run_id: str) -> None:
    metrics = MetricLogger(run_id)
    for step in range(1, 2501):
        metrics.log(step, {"train/loss": 1 / step, "train/accuracy": float("nan")})
    assert metrics.close(PATIENCE) == ()
    assert history(run_id, "train/loss") == [(step, 1 / step) for step in range(1, 2501)]
    assert len(history(run_id, "train/accuracy")) == 2500


def test_rows_sent_again_after_a_resume_are_stored_once(run_id: str) -> None:
    first = MetricLogger(run_id)
    first.log(1, {"loss": 0.5, "nan": float("nan")})
    rows = first.unacknowledged()
    assert first.close(PATIENCE) == ()

    rows_type = TypeAdapter(tuple[MetricRow, ...])
    checkpoint = rows_type.dump_json(rows)
    resumed = MetricLogger(run_id, backlog=rows_type.validate_json(checkpoint))
    resumed.log(2, {"loss": 0.25})
    assert resumed.close(PATIENCE) == ()
    assert history(run_id, "loss") == [(1, 0.5), (2, 0.25)]
    assert len(history(run_id, "nan")) == 1


def test_a_resumed_logger_sends_what_the_server_lacks_and_only_that(run_id: str) -> None:
    earlier = MetricLogger(run_id)
    for step in (1, 2, 3):
        earlier.log(step, {"loss": 1 / step} | ({"val": 0.5} if step == 2 else {}))
    assert earlier.close(PATIENCE) == ()

    # The checkpoint of step 2 did not know yet that its rows would arrive, nor that the server would get step 3.
    backlog = [MetricRow(step=step, timestamp=1, values={"loss": 1 / step, "lost": 0.1 * step}) for step in (1, 2)]
    resumed = MetricLogger(run_id, backlog=backlog)
    resumed.log(3, {"loss": 1 / 3, "fresh": 3.0})  # repeated after the resume
    resumed.log(4, {"loss": 1 / 4, "val": 0.75})
    assert resumed.close(PATIENCE) == ()
    assert history(run_id, "loss") == [(step, 1 / step) for step in (1, 2, 3, 4)]
    assert history(run_id, "val") == [(2, 0.5), (4, 0.75)]
    assert history(run_id, "lost") == [(1, 0.1), (2, 0.2)]
    assert history(run_id, "fresh") == [(3, 3.0)]


@pytest.mark.slow
def test_a_resumed_logger_keeps_the_backlog_first_and_asks_again_while_the_server_is_down(
    monkeypatch: pytest.MonkeyPatch, free_address: str, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", free_address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with mlflow_server(free_address, tmp_path):
        run_id = mlflow_runs.start_run("resumed-in-an-outage", "run", {}, {})
        mlflow_runs.log_metrics(run_id, {"loss": 1.0}, step=1)
    backlog = [MetricRow(step=step, timestamp=1, values={"loss": 1 / step}) for step in (1, 2)]
    resumed = MetricLogger(run_id, backlog=backlog)
    resumed.log(3, {"loss": 1 / 3})
    wait_for(lambda: resumed._failures)
    assert [row.step for row in resumed.unacknowledged()] == [1, 2, 3]
    with mlflow_server(free_address, tmp_path):
        assert resumed.close(PATIENCE) == ()
        assert sorted(history(run_id, "loss")) == [(1, 1.0), (2, 0.5), (3, 1 / 3)]


def test_what_another_process_logged_during_an_outage_is_not_logged_again(
    run_id: str, monkeypatch: pytest.MonkeyPatch, free_address: str
) -> None:
    address = os.environ["MLFLOW_TRACKING_URI"]
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", free_address)
    cut_off = MetricLogger(run_id)
    for step in (1, 2, 3):
        cut_off.log(step, {"loss": 1 / step})
    wait_for(lambda: cut_off._failures)
    MlflowClient(address).log_batch(run_id, [Metric("loss", 1 / step, 1, step) for step in (1, 2)])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert cut_off.close(PATIENCE) == ()
    assert history(run_id, "loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]


def test_rows_that_a_process_left_behind_are_delivered_once(run_id: str) -> None:
    rows = [MetricRow(step=step, timestamp=step, values={"loss": 1 / step}, keep=step == 2) for step in (1, 2)]
    for _ in range(2):
        deliver(run_id, rows)
    assert history(run_id, "loss") == [(1, 1.0), (2, 0.5)]


def test_a_final_figure_that_is_measured_anew_after_a_resume_is_logged_once(run_id: str) -> None:
    mlflow_runs.log_metrics(run_id, {"test/latency_mean_ms": 1.5, "test/nan": float("nan")})
    mlflow_runs.log_metrics(run_id, {"test/latency_mean_ms": 1.6, "test/nan": float("nan"), "test/loss": 0.5})
    assert [history(run_id, f"test/{name}") for name in ("latency_mean_ms", "loss")] == [[(0, 1.5)], [(0, 0.5)]]
    assert len(history(run_id, "test/nan")) == 1
    mlflow_runs.log_metrics(run_id, {"test/loss": 0.5})


def test_rows_that_the_server_refuses_do_not_stop_those_behind_them(run_id: str) -> None:
    refused = MetricRow(step=1, timestamp=1, values={"not?a name": 1.0})
    metrics = MetricLogger(run_id, backlog=[refused])
    wait_for(lambda: not metrics.unacknowledged())
    metrics.log(2, {"loss": 0.5})
    assert metrics.close(PATIENCE) == ()
    assert history(run_id, "loss") == [(2, 0.5)]


def test_full_buffer_thins_the_oldest_steps_but_no_epoch(monkeypatch: pytest.MonkeyPatch, free_address: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", free_address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    metrics = MetricLogger("0" * 32, capacity=400)
    for step in range(1, 2001):
        metrics.log(step, {"loss": 1.0}, keep=step % 100 == 0)
    rows = metrics.close(0)
    steps = [row.step for row in rows]
    assert len(rows) <= 400
    assert steps == sorted(steps)
    assert {step for step in steps if step % 100 == 0} == set(range(100, 2001, 100))
    newest = [step for step in steps if step > 1800]
    assert newest == list(range(1801, 2001))
    assert len([step for step in steps if step <= 1000]) < 200


@pytest.mark.long
def test_outage_of_the_server_loses_and_repeats_no_step(
    monkeypatch: pytest.MonkeyPatch, free_address: str, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", free_address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with mlflow_server(free_address, tmp_path):
        run_id = mlflow_runs.start_run("outage", "run", {}, {})
        metrics = MetricLogger(run_id)
        for step in range(1, 101):
            metrics.log(step, {"loss": 1 / step})
        wait_for(lambda: not metrics.unacknowledged())
    for step in range(101, 301):
        metrics.log(step, {"loss": 1 / step})
    wait_for(lambda: metrics._failures >= 2)  # the thread has noticed the outage
    assert [row.step for row in metrics.unacknowledged()] == list(range(101, 301))
    with mlflow_server(free_address, tmp_path):
        for step in range(301, 401):
            metrics.log(step, {"loss": 1 / step})
        assert metrics.close(PATIENCE) == ()
        assert history(run_id, "loss") == [(step, 1 / step) for step in range(1, 401)]


def test_close_returns_in_time_what_a_dead_server_did_not_take(
    monkeypatch: pytest.MonkeyPatch, free_address: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", free_address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "7")  # minutes of retries inside MLflow
    metrics = MetricLogger("0" * 32)
    metrics.log(1, {"loss": 0.5})
    (row,) = metrics.close(1.0)
    assert (row.step, row.values) == (1, {"loss": 0.5})


def test_system_metrics_join_the_run(run_id: str) -> None:
    metrics = MetricLogger(run_id)
    system = SystemMetrics(metrics, interval=0.2)
    system.start()
    wait_for(lambda: len(history(run_id, "system/cpu_utilization_percentage")) >= 2)
    system.stop()
    assert metrics.close(PATIENCE) == ()
    assert all(memory > 0 for _, memory in history(run_id, "system/system_memory_usage_megabytes"))


@pytest.mark.long
def test_system_metrics_have_each_step_once_though_they_stop_within_an_interval(run_id: str) -> None:
    metrics = MetricLogger(run_id)
    system = SystemMetrics(metrics, interval=2.0)
    system.start()
    wait_for(metrics.unacknowledged)
    system.stop()
    assert metrics.close(PATIENCE) == ()
    steps = [step for step, _ in history(run_id, "system/cpu_utilization_percentage")]
    assert steps and steps == sorted(set(steps))


def test_system_metrics_survive_a_server_that_is_down(monkeypatch: pytest.MonkeyPatch, free_address: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", free_address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    metrics = MetricLogger("0" * 32)
    system = SystemMetrics(metrics, interval=0.05)
    system.start()
    system.stop()
    assert not system._thread.is_alive()
    metrics.close(0)


@pytest.fixture
def free_address() -> str:
    """Returns an address of this machine with a free port."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@contextmanager
def mlflow_server(address: str, folder: Path) -> Iterator[None]:
    """Starts a server at `address`, with a database in `folder` that later servers use too."""
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", address.rpartition(":")[2],
        "--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("ab") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        wait_for(lambda: server.poll() is not None or answers())
        assert server.poll() is None, (folder / "server.log").read_text()
        yield
    finally:
        os.killpg(server.pid, 9)
        server.wait()


def answers() -> bool:
    try:
        check_server()
    except ServiceError:
        return False
    return True
