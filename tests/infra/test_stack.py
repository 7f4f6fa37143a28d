"""The session's three servers together, and external servers in their place."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx
import psutil
import pytest

from infra.errors import ServiceError
from infra.settings import Settings
from infra.stack.endpoints import Endpoints
from infra.stack.local_stack import down, status, up
from infra.stack.state import SERVER_NAMES, StackFolder
from infra.storage.object_store import ObjectStore
from tests.infra.localstack import REPOSITORY, S3, busy_port, own, own_environment, pids, until, use

__all__ = ["busy_port", "own", "own_environment"]  # fixtures

pytestmark = pytest.mark.usefixtures("own_environment")


def test_a_second_up_starts_nothing(stack: Endpoints, settings: Settings) -> None:
    before = pids(settings)
    events: list[str] = []
    assert up(settings, events.append) == stack
    assert events == []
    assert pids(settings) == before
    assert all(before.values())


def test_status_names_each_running_server_with_its_address_and_log(stack: Endpoints, settings: Settings) -> None:
    found = status(settings)
    assert [(server.name, server.state) for server in found] == [(name, "running") for name in SERVER_NAMES]
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
        for name in SERVER_NAMES
        for process in folder.members(name)
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert {address.ip for address in listening} == {"127.0.0.1"}
    assert {address.port for address in listening} == {
        *folder.ports.seaweedfs,
        folder.ports.mlflow,
        folder.ports.prefect,
    }


def test_other_users_of_the_machine_cannot_read_data(s3: Endpoints, settings: Settings) -> None:
    private = [settings.home, settings.cache, settings.runs, settings.logs]
    for folder in private:
        folder.chmod(0o755)  # as earlier versions made them
    up(settings, only=[])
    assert {folder.stat().st_mode & 0o777 for folder in private} == {0o700}
    assert (settings.home / ".gitignore").read_text() == "*\n"  # its credentials must not be committed


def test_a_state_folder_of_the_users_own_keeps_its_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    up(Settings(home=tmp_path), only=[])
    assert tmp_path.stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    assert not (tmp_path / ".gitignore").exists()  # it may be a repository


def test_secrets_are_in_private_files_and_nowhere_else(stack: Endpoints, settings: Settings) -> None:
    folder = StackFolder(settings)
    secrets = [getattr(folder.credentials, name).get_secret_value() for name in type(folder.credentials).model_fields]
    for process in (process for name in SERVER_NAMES for process in folder.members(name)):
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


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root, to become another user")
@pytest.mark.parametrize("command", ["status", "down", "up"])
def test_a_stack_of_another_user_is_neither_stopped_nor_absent(command: str) -> None:
    with tempfile.TemporaryDirectory() as home:
        Path(home).chmod(0o755)
        Path(home, "stack").mkdir(mode=0o700)
        code = (
            f"import os; from infra.stack import local_stack as stack; from infra.settings import Settings; "
            f"settings = Settings(); os.setuid(65534); stack.{command}(settings)"
        )
        environment = {**os.environ, "CONVOY_HOME": home}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True
        )
    assert "UsageError" in done.stderr.splitlines()[-1] and f"{home}/stack" in done.stderr.splitlines()[-1]


def test_a_state_folder_that_is_none_cannot_be_stopped_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "stack").write_text("a file")
    monkeypatch.setenv("CONVOY_HOME", str(tmp_path / "home"))
    with pytest.raises(ServiceError, match="cannot be stopped"):
        down(Settings())


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
    assert httpx.get(address).status_code == 403  # the bucket exists, but needs credentials


def test_children_find_the_same_state_folder_from_any_working_folder(s3: Endpoints, settings: Settings) -> None:
    assert s3.environment()["CONVOY_HOME"] == str(settings.home)
    assert s3.environment()["CONVOY_BUCKET"] == settings.bucket


@pytest.mark.long
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
