"""The local stack, with real servers. Tests that need only a start and a stop use SeaweedFS alone, ready in a second."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from infra import ports, servers
from infra.errors import ServiceError
from infra.objectstore import ObjectStore
from infra.ports import Ports
from infra.settings import Settings
from infra.stack import NAMES, Endpoints, ServerStatus, down, status, up
from infra.stackfolder import StackFolder

REPOSITORY = Path(__file__).parents[2]
S3 = ["seaweedfs"]


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away what the session's stack has set, so that a test's own `Settings` mean local servers."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "CONVOY_", "MLFLOW_", "PREFECT_")):
            monkeypatch.delenv(name)


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Settings]:
    """Settings of a stack of the test's own, which is stopped after it."""
    settings = Settings(home=tmp_path / ".convoy")
    yield settings
    down(settings)
    assert not any(StackFolder(settings).members(name) for name in NAMES)


def state_of(settings: Settings, name: str = "seaweedfs") -> ServerStatus:
    return next(server for server in status(settings) if server.name == name)


def pids(settings: Settings) -> dict[str, int | None]:
    return {server.name: server.pid for server in status(settings)}


def use(endpoints: Endpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in endpoints.environment().items():
        monkeypatch.setenv(name, value)


def run_up(settings: Settings) -> "subprocess.Popen[str]":
    program = (
        "import sys; from infra.settings import Settings; from infra.stack import up; "
        "up(Settings(home=sys.argv[1]), only=['seaweedfs'])"
    )
    command = [sys.executable, "-c", program, str(settings.home)]
    return subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


# All three servers, shared by the session


def test_a_second_up_starts_nothing(stack: Endpoints, settings: Settings) -> None:
    before = pids(settings)
    events: list[str] = []
    assert up(settings, events.append) == stack
    assert events == []
    assert pids(settings) == before
    assert all(before.values())


def test_status_names_each_running_server_with_its_address_and_log(stack: Endpoints, settings: Settings) -> None:
    found = status(settings)
    assert [(server.name, server.state) for server in found] == [(name, "running") for name in NAMES]
    assert [server.url for server in found] == [
        stack.s3_endpoint_url,
        stack.mlflow_tracking_uri,
        stack.prefect_ui_url,
    ]
    assert all(server.log and server.log.exists() for server in found)


def test_every_port_is_bound_to_the_loopback_address(stack: Endpoints, settings: Settings) -> None:
    folder = StackFolder(settings)
    listening = [
        connection.laddr
        for name in NAMES
        for process in folder.members(name)
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert {address.ip for address in listening} == {"127.0.0.1"}
    assert {address.port for address in listening} == set(folder.ports.model_dump().values())


def test_secrets_are_in_private_files_and_nowhere_else(stack: Endpoints, settings: Settings) -> None:
    folder = StackFolder(settings)
    secrets = [
        getattr(folder.credentials, name).get_secret_value() for name in type(folder.credentials).model_fields
    ]
    for process in (process for name in NAMES for process in folder.members(name)):
        assert not any(secret in " ".join(process.cmdline()) for secret in secrets)
    for log in settings.logs.iterdir():
        assert not any(secret in log.read_text(errors="replace") for secret in secrets)
    assert not any(secret in repr(stack) for secret in secrets)
    for name in ("credentials.json", "key.pem"):
        assert (folder.root / name).stat().st_mode & 0o777 == 0o600
    assert folder.root.stat().st_mode & 0o777 == 0o700


def test_mlflow_keeps_artifacts_in_the_bucket_for_clients_without_its_keys(
    stack: Endpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"{stack.mlflow_tracking_uri}/api/2.0"
    with httpx.Client() as client:
        created = client.post(f"{address}/mlflow/experiments/create", json={"name": "artifacts of a stack"})
        experiment = created.raise_for_status().json()["experiment_id"]
        run = client.post(f"{address}/mlflow/runs/create", json={"experiment_id": experiment}).raise_for_status()
        root = run.json()["run"]["info"]["artifact_uri"].removeprefix("mlflow-artifacts:/")
        file = f"{address}/mlflow-artifacts/artifacts/{root}/note.txt"
        client.put(file, content=b"kept").raise_for_status()
        assert client.get(file).content == b"kept"
    use(stack, monkeypatch)
    assert ObjectStore.connect(stack.bucket).get_bytes(f"mlflow/{root}/note.txt") == b"kept"


def test_prefect_has_its_interface_and_no_telemetry(stack: Endpoints) -> None:
    settings = httpx.get(f"{stack.prefect_api_url}/admin/settings").raise_for_status().json()
    assert settings["server"]["analytics_enabled"] is False
    page = httpx.get(stack.prefect_ui_url, follow_redirects=True).raise_for_status()
    assert page.headers["content-type"].startswith("text/html")


@pytest.mark.parametrize("server", ["mlflow", "prefect"])
def test_a_web_page_from_elsewhere_may_not_call_the_servers(stack: Endpoints, server: str) -> None:
    path = {
        "mlflow": f"{stack.mlflow_tracking_uri}/api/2.0/mlflow/experiments/search",
        "prefect": f"{stack.prefect_api_url}/flows/filter",
    }[server]
    headers = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    answer = httpx.options(path, headers=headers)
    assert answer.headers.get("access-control-allow-origin") not in ("*", "https://elsewhere.example")


# External servers


def test_external_servers_are_used_and_none_is_started(
    stack: Endpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(stack, monkeypatch)
    settings = Settings(home=tmp_path)
    endpoints = up(settings)
    assert [(server.state, server.pid) for server in status(settings)] == [("external", None)] * 3
    assert endpoints.s3_endpoint_url == stack.s3_endpoint_url
    assert endpoints.mlflow_tracking_uri == stack.mlflow_tracking_uri
    assert endpoints.prefect_api_url == stack.prefect_api_url
    assert endpoints.prefect_ui_url == stack.prefect_ui_url
    assert not any(name.startswith("AWS_") for name in endpoints.environment())
    assert down(settings) == []


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "MLFLOW_TRACKING_URI", "PREFECT_API_URL"])
def test_an_external_server_that_does_not_answer_is_named(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv(variable, f"http://me:hunter2@127.0.0.1:{port}/api")
    settings = Settings(home=tmp_path)
    with pytest.raises(ServiceError, match=variable) as failure:
        up(settings)
    assert "\n" not in str(failure.value)
    assert "hunter2" not in str(failure.value) + repr(status(settings))
    assert all(server.pid is None for server in status(settings))


def test_a_local_mlflow_gets_the_keys_of_an_external_object_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://s3.example")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "the user's")
    monkeypatch.setenv("AWS_PROFILE", "work")
    environment = StackFolder(Settings(home=tmp_path)).server("mlflow").environment
    assert environment["MLFLOW_S3_ENDPOINT_URL"] == "https://s3.example"
    assert environment["AWS_ACCESS_KEY_ID"] == "the user's"
    assert environment["AWS_PROFILE"] == "work"


# Starting and stopping


def test_a_server_outlives_the_command_that_started_it(own: Settings) -> None:
    command = run_up(own)
    assert command.wait() == 0
    assert state_of(own).state == "running"
    leader = state_of(own).pid
    assert leader is not None
    assert os.getsid(leader) == leader != os.getsid(0)


def test_two_commands_at_once_start_one_server(own: Settings) -> None:
    commands = [run_up(own), run_up(own)]
    for command in commands:
        _, complaints = command.communicate()
        assert (command.returncode, complaints) == (0, "")
    assert len(StackFolder(own).members("seaweedfs")) == 1


def test_down_stops_what_runs_and_says_so(own: Settings) -> None:
    up(own, only=S3)
    members = StackFolder(own).members("seaweedfs")
    assert members
    assert down(own) == ["seaweedfs"]
    assert not any(process.is_running() for process in members)
    assert state_of(own).state == "stopped"
    assert down(own) == []


def test_down_and_status_of_a_folder_that_was_never_used_leave_no_trace(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / ".convoy")
    assert down(settings) == []
    assert {server.state for server in status(settings)} == {"stopped"}
    assert not settings.home.exists()


def test_a_killed_server_is_dead_and_starts_again_at_the_same_address_with_its_data(
    own: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = up(own, only=S3)
    use(first, monkeypatch)
    ObjectStore.connect(own.bucket).put_bytes("key", b"kept")
    (process,) = StackFolder(own).members("seaweedfs")
    process.kill()
    until(lambda: state_of(own).state == "dead")
    assert up(own, only=S3) == first
    assert ObjectStore.connect(own.bucket).get_bytes("key") == b"kept"


def test_a_stale_record_does_not_harm_the_process_that_has_its_id_now(own: Settings) -> None:
    folder = StackFolder(own)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as stranger:
        created = psutil.Process(stranger.pid).create_time() - 3600
        folder.root.mkdir(parents=True)
        folder.record_file("seaweedfs").write_text(
            f'{{"pid": {stranger.pid}, "created": {created}, "digest": "old"}}'
        )
        assert state_of(own).state == "dead"
        up(own, only=S3)
        assert state_of(own).state == "running"
        assert state_of(own).pid != stranger.pid
        down(own)
        assert stranger.poll() is None
        stranger.kill()


def test_servers_whose_state_folder_was_deleted_are_stopped(own: Settings) -> None:
    up(own, only=S3)
    members = StackFolder(own).members("seaweedfs")
    shutil.rmtree(own.home)
    up(own, only=S3)
    assert not any(process.is_running() for process in members)
    shutil.rmtree(own.home)
    assert down(own) == ["seaweedfs"]


def test_a_stopped_server_that_does_not_answer_is_replaced(
    own: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infra.stack.BUSY_PATIENCE", 0.5)
    monkeypatch.setattr("infra.processes.TERM_PATIENCE", 0.5)
    monkeypatch.setattr("infra.stack.ANSWER_PATIENCE", 0.5)
    first = up(own, only=S3)
    (process,) = StackFolder(own).members("seaweedfs")
    process.send_signal(signal.SIGSTOP)
    events: list[str] = []
    assert up(own, events.append, only=S3) == first
    assert events[0] == "stopping seaweedfs, which does not answer"
    assert not process.is_running()


def test_a_server_that_dies_at_its_start_is_reported_with_the_end_of_its_log(own: Settings) -> None:
    database = own.home / "mlflow" / "mlflow.db"
    database.parent.mkdir(parents=True)
    database.write_text("no database at all " * 1000)
    with pytest.raises(ServiceError, match=r"mlflow ended at its start with status 1; .*mlflow\.log ends: ") as failure:
        up(own, only=["mlflow"])
    assert "not a database" in str(failure.value)
    assert "\n" not in str(failure.value)
    assert StackFolder(own).members("mlflow") == set()


def test_a_state_folder_that_cannot_be_used_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ServiceError, match="cannot be started"):
        up(Settings(home=tmp_path / "file"), only=S3)


# Ports


def test_a_busy_port_is_replaced_by_a_free_one_that_stays(own: Settings, busy_port: int) -> None:
    settings = own.model_copy(update={"s3_port": busy_port})
    events: list[str] = []
    first = up(settings, events.append, only=S3)
    assert f"port {busy_port} is not used for s3: another program has it" in events
    assert first.s3_endpoint_url != f"http://127.0.0.1:{busy_port}"
    down(settings)
    assert up(settings, only=S3).s3_endpoint_url == first.s3_endpoint_url


def test_a_port_taken_between_the_look_and_the_start_is_replaced(
    own: Settings, busy_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = iter([True] * len(Ports.model_fields))  # the first choice believes that all are free
    really = ports.is_free
    monkeypatch.setattr(ports, "is_free", lambda port: next(looks, None) or really(port))
    events: list[str] = []
    up(own.model_copy(update={"s3_port": busy_port}), events.append, only=S3)
    assert f"another program took port {busy_port} before seaweedfs did: choosing another" in events
    assert state_of(own).state == "running"


def test_an_answer_from_somebody_elses_server_does_not_count(own: Settings, s3: Endpoints) -> None:
    """The session's store answers at the address at which the test's own one should."""
    up(own, only=S3)
    folder = StackFolder(own)
    taken = int(s3.s3_endpoint_url.rsplit(":", 1)[1])
    (folder.root / "ports.json").write_text(folder.ports.model_copy(update={"s3": taken}).model_dump_json())
    assert state_of(own).url == s3.s3_endpoint_url
    assert state_of(own).state == "dead"


def test_ports_of_running_servers_stay_and_no_port_is_given_twice(busy_port: int) -> None:
    wanted = Ports(s3=busy_port, mlflow=busy_port, prefect=4200)
    chosen = ports.choose(wanted, kept=["mlflow"], preferred={})
    assert chosen.mlflow == busy_port
    assert chosen.s3 != busy_port
    numbers = list(chosen.model_dump().values())
    assert len(set(numbers)) == len(numbers)


# Settings of the user that are none of the local servers' business


def test_the_users_own_aws_settings_do_not_reach_the_local_store(
    own: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAUSERSOWN")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the user's own")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "the user's own")
    monkeypatch.setenv("AWS_PROFILE", "no-such-profile")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    endpoints = up(own, only=S3)
    use(endpoints, monkeypatch)
    store = ObjectStore.connect(own.bucket)
    store.put_bytes("key", b"value")
    assert store.get_bytes("key") == b"value"


def test_a_running_store_gets_another_bucket_without_a_restart(own: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoints = up(own, only=S3)
    before = pids(own)
    other = own.model_copy(update={"bucket": "another-bucket"})
    up(other, only=S3)
    assert pids(own) == before
    address = f"{endpoints.s3_endpoint_url}/another-bucket"
    assert httpx.get(address).status_code == 403  # it is there, though not for everybody


def test_children_find_the_same_state_folder_from_any_working_folder(s3: Endpoints, settings: Settings) -> None:
    assert s3.environment()["CONVOY_HOME"] == str(settings.home)
    assert s3.environment()["CONVOY_BUCKET"] == settings.bucket


def test_a_killed_test_session_leaves_no_server(tmp_path: Path) -> None:
    test = tmp_path / "test_killed.py"
    test.write_text(
        "import os, signal, pathlib\n"
        "def test_killed(s3, settings):\n"
        f"    pathlib.Path({str(tmp_path)!r}, 'home').write_text(str(settings.home))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", f"--rootdir={tmp_path}", str(test)]
    done = subprocess.run([*command, f"--basetemp={tmp_path / 'base'}"], cwd=REPOSITORY, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    folder = StackFolder(Settings(home=Path((tmp_path / "home").read_text())))
    until(lambda: not folder.members("seaweedfs"))
    until(lambda: not folder.record_file("seaweedfs").exists())
