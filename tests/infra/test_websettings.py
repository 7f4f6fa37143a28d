"""Proxies and certificates of the user's shell apply to the web, and not to local servers."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from infra.errors import ServiceError, UsageError
from infra.fetch.meter import Meter
from infra.fetch.web import Web
from infra.settings import Settings
from infra.stack.endpoints import Endpoints
from infra.stack.local_stack import up
from infra.storage.s3_client import open_client
from infra.web_settings import loopback_without_proxy, proxy_of, usable_web_environment
from tests.conftest import REPOSITORY

NOWHERE = "http://127.0.0.1:1"
NONSENSE = """
AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN AWS_SECURITY_TOKEN AWS_CREDENTIAL_EXPIRATION AWS_PROFILE
AWS_DEFAULT_PROFILE AWS_CONFIG_FILE AWS_SHARED_CREDENTIALS_FILE AWS_DEFAULT_REGION AWS_REGION AWS_CA_BUNDLE
AWS_MAX_ATTEMPTS AWS_RETRY_MODE AWS_DEFAULTS_MODE AWS_DATA_PATH AWS_STS_REGIONAL_ENDPOINTS
AWS_METADATA_SERVICE_TIMEOUT AWS_METADATA_SERVICE_NUM_ATTEMPTS AWS_EC2_METADATA_SERVICE_ENDPOINT
AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE AWS_ROLE_ARN AWS_WEB_IDENTITY_TOKEN_FILE AWS_ROLE_SESSION_NAME
AWS_CONTAINER_CREDENTIALS_FULL_URI AWS_S3_US_EAST_1_REGIONAL_ENDPOINT AWS_S3_USE_ARN_REGION
AWS_S3_DISABLE_MULTIREGION_ACCESS_POINTS AWS_S3_DISABLE_EXPRESS_SESSION_AUTH AWS_SIGV4A_SIGNING_REGION_SET
AWS_REQUEST_MIN_COMPRESSION_SIZE_BYTES AWS_DISABLE_REQUEST_COMPRESSION AWS_REQUEST_CHECKSUM_CALCULATION
AWS_RESPONSE_CHECKSUM_VALIDATION AWS_ACCOUNT_ID_ENDPOINT_MODE AWS_AUTH_SCHEME_PREFERENCE AWS_SDK_UA_APP_ID
AWS_ENDPOINT_URL_STS
MLFLOW_REGISTRY_URI MLFLOW_TRACKING_USERNAME MLFLOW_TRACKING_PASSWORD MLFLOW_TRACKING_TOKEN MLFLOW_TRACKING_AUTH
MLFLOW_TRACKING_AWS_SIGV4 MLFLOW_TRACKING_SERVER_CERT_PATH MLFLOW_WORKSPACE MLFLOW_TRACKING_CLIENT_CERT_PATH
MLFLOW_RUN_ID MLFLOW_EXPERIMENT_ID MLFLOW_EXPERIMENT_NAME MLFLOW_HTTP_REQUEST_TIMEOUT MLFLOW_HTTP_REQUEST_MAX_RETRIES
MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR MLFLOW_S3_ENDPOINT_URL MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT
MLFLOW_S3_UPLOAD_EXTRA_ARGS
PREFECT_HOME PREFECT_PROFILE PREFECT_PROFILES_PATH PREFECT_API_KEY PREFECT_API_AUTH_STRING PREFECT_API_SSL_CERT_FILE
PREFECT_API_REQUEST_TIMEOUT PREFECT_CLOUD_API_URL PREFECT_CLIENT_MAX_RETRIES PREFECT_CLIENT_CUSTOM_HEADERS
PREFECT_API_TLS_INSECURE_SKIP_VERIFY PREFECT_API_ENABLE_HTTP2 PREFECT_LOGGING_LEVEL PREFECT_RESULTS_DEFAULT_SERIALIZER
PREFECT_RESULTS_PERSIST_BY_DEFAULT
"""
MISLEADING = {
    # proxies and certificates: httpx, requests, botocore, urllib, websockets
    "ALL_PROXY": "socks5://127.0.0.1:1",
    "all_proxy": "ftp://127.0.0.1:1",
    "HTTP_PROXY": NOWHERE,
    "http_proxy": "socks4://127.0.0.1:1",
    "HTTPS_PROXY": "nonsense://x",
    "https_proxy": NOWHERE,
    "ws_proxy": NOWHERE,
    "wss_proxy": NOWHERE,
    "socks_proxy": "127.0.0.1:1",
    "NO_PROXY": "10.0.0.0/8,fe80::/10,[::1]",
    "no_proxy": "fe80::/10,[::1]:80,,x:y:z",
    "SSL_CERT_FILE": "/nonexistent/cacert.pem",
    "SSL_CERT_DIR": "/nonexistent",
    "SSLKEYLOGFILE": "/nonexistent/keys",
    "REQUESTS_CA_BUNDLE": "/nonexistent/requests.pem",
    "CURL_CA_BUNDLE": "/nonexistent/curl.pem",
    **dict.fromkeys(NONSENSE.split(), "nonsense"),
    "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true",
    "AWS_USE_FIPS_ENDPOINT": "true",
    "AWS_USE_DUALSTACK_ENDPOINT": "true",
    "MLFLOW_TRACKING_INSECURE_TLS": "true",
}
USE_EVERY_CLIENT = """
import sys
from flows.cli.console import servers_up
servers_up()
from infra.tracking.client import check_server, mlflow_client
from infra.storage.object_store import ObjectStore
from prefect import get_client
store = ObjectStore.connect("convoy")
store.put_bytes("shell/test", b"whole")
assert store.get_bytes("shell/test") == b"whole"
store.delete("shell/test")
check_server()
with mlflow_client("look") as client:
    assert client.search_experiments()
with get_client(sync_client=True) as client:
    assert client.hello().status_code == 200
    assert str(client.api_url).startswith("http://127.0.0.1:")
"""


def from_a_fresh_shell(home: Path, **variables: str) -> dict[str, str]:
    own = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LANG") if name in os.environ}
    return own | {"CONVOY_HOME": str(home)} | variables


@pytest.fixture
def local(tmp_path: Path) -> Endpoints:
    """Endpoints of a local stack that does not run."""
    return Endpoints.model_validate(
        {
            "home": tmp_path,
            "bucket": "convoy",
            "s3_endpoint_url": "http://127.0.0.1:8333",
            "s3_access_key_id": "id",
            "s3_secret_access_key": "secret",
            "mlflow_tracking_uri": "http://127.0.0.1:5000",
            "mlflow_is_local": True,
            "prefect_api_url": "http://127.0.0.1:4200/api",
            "prefect_ui_url": "http://127.0.0.1:4200",
            "prefect_is_local": True,
        }
    )


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The process's environment, which is restored after the test."""
    before = dict(os.environ)
    yield monkeypatch
    monkeypatch.undo()
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.long
def test_local_servers_are_reached_whatever_the_shell_sets(stack: Endpoints) -> None:
    done = subprocess.run(
        [sys.executable, "-c", USE_EVERY_CLIENT],
        env=from_a_fresh_shell(stack.home, **MISLEADING),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", MISLEADING)
def test_no_client_of_a_local_server_sees_what_a_shell_sets_for_others(
    local: Endpoints, shell: pytest.MonkeyPatch, name: str
) -> None:
    shell.setenv(name, MISLEADING[name])
    local.apply()
    assert os.environ.get(name) in {None, local.environment().get(name)} - {MISLEADING[name]}
    httpx.Client().close()


@pytest.mark.parametrize("servers", ["s3", "mlflow", "prefect"])
def test_an_external_servers_settings_stay(local: Endpoints, shell: pytest.MonkeyPatch, servers: str) -> None:
    changed = {
        "s3": {"s3_access_key_id": None, "s3_secret_access_key": None},
        "mlflow": {"mlflow_is_local": False},
        "prefect": {"prefect_is_local": False},
    }
    variables = {"AWS_USE_X": "s3", "MLFLOW_TRACKING_TOKEN": "mlflow", "PREFECT_API_KEY": "prefect"}
    for name in variables:
        shell.setenv(name, "mine")
    shell.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    local.model_copy(update=changed[servers]).apply()
    assert {name for name in variables if name in os.environ} == {n for n, s in variables.items() if s == servers}
    assert os.environ["HTTPS_PROXY"] == "http://proxy.example:3128"


@pytest.mark.parametrize(
    "name", ["ALL_PROXY", "all_proxy", "http_proxy", "HTTPS_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR", "CURL_CA_BUNDLE"]
)
def test_a_variable_that_no_client_of_an_external_server_could_use_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, MISLEADING[name])
    with pytest.raises(UsageError, match=rf"^{name} "):
        up(Settings(home=tmp_path, mlflow_uri="https://mlflow.example"), only=["mlflow"])


@pytest.mark.parametrize("name", ["AWS_PROFILE", "AWS_DEFAULTS_MODE", "AWS_STS_REGIONAL_ENDPOINTS"])
def test_a_setting_that_boto3_cannot_use_for_an_external_store_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store.example")
    monkeypatch.setenv(name, "nonsense")
    with pytest.raises(UsageError, match=rf"nonsense.*{name}"):
        open_client()


def test_an_external_store_is_the_one_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store.example")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "true")
    assert open_client().meta.endpoint_url == "http://store.example"


def test_an_external_address_that_is_none_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="MLFLOW_TRACKING_URI names"):
        up(Settings(home=tmp_path, mlflow_uri="http://mlflow.example/\x01"), only=["mlflow"])


def test_the_password_of_a_proxy_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://me:pass@word:x/y")
    with pytest.raises(UsageError, match=r"^HTTP_PROXY ") as refused:
        up(Settings(home=tmp_path, mlflow_uri="https://mlflow.example"), only=["mlflow"])
    assert "pass" not in str(refused.value)


def test_entries_of_no_proxy_that_httpx_cannot_read_are_mended_or_left_out() -> None:
    given = {"no_proxy": "10.0.0.0/8,fe80::/10,[::1],[::1]:80,intranet.example:8080, ::1 ,.local"}
    assert loopback_without_proxy(given)["NO_PROXY"] == (
        "10.0.0.0/8,::1,intranet.example:8080,::1,.local,127.0.0.1,localhost"
    )


def test_no_proxy_at_all_stays_so(shell: pytest.MonkeyPatch) -> None:
    shell.setenv("https_proxy", "http://proxy.example:3128")
    shell.setenv("no_proxy", "*")
    assert loopback_without_proxy() == dict.fromkeys(("no_proxy", "NO_PROXY"), "*")
    assert proxy_of("https://mlflow.example/") is None


def test_a_server_that_sends_notifications_keeps_the_proxies_that_work(shell: pytest.MonkeyPatch) -> None:
    shell.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    shell.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    shell.setenv("SSL_CERT_FILE", "/nonexistent")
    found = usable_web_environment()
    assert found["HTTPS_PROXY"] == "http://proxy.example:3128"
    assert not {"ALL_PROXY", "SSL_CERT_FILE"} & found.keys()


class _Proxy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Content-Length", "5")
        self.end_headers()
        self.wfile.write(b"found")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def proxy() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Proxy)
    server.asked = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_data_come_through_the_users_proxy_although_local_servers_do_not(
    local: Endpoints, shell: pytest.MonkeyPatch, proxy: ThreadingHTTPServer, tmp_path: Path
) -> None:
    for name in ("http_proxy", "NO_PROXY", "no_proxy"):
        shell.delenv(name, raising=False)
    shell.setenv("HTTP_PROXY", f"127.0.0.1:{proxy.server_port}")
    shell.setenv("ALL_PROXY", "socks5://127.0.0.1:1")  # another proxy is set for this address
    local.apply()
    assert not {"HTTP_PROXY", "ALL_PROXY"} & os.environ.keys()
    local.apply()  # again, as a child process does: no variable is lost
    web = Web(tmp_path)
    with web.fetched("http://nowhere.invalid/images.zip", None, Meter(5, lambda done: None, threading.Event())) as file:
        assert file.read_bytes() == b"found"
    web.close()
    assert proxy.asked == ["http://nowhere.invalid/images.zip"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "name, value, fault",
    [("HTTPS_PROXY", "socks5://127.0.0.1:1", "SOCKS"), ("SSL_CERT_FILE", "/nonexistent", "names /nonexistent")],
)
def test_a_variable_that_keeps_data_away_is_named_once_they_are_asked_for(
    local: Endpoints, shell: pytest.MonkeyPatch, tmp_path: Path, name: str, value: str, fault: str
) -> None:
    shell.delenv("https_proxy", raising=False)
    shell.setenv(name, value)
    local.apply()
    web = Web(tmp_path)
    with pytest.raises(ServiceError, match=rf"{name} names .*{fault}|{name} {fault}"):
        web.version("https://nowhere.invalid/images.zip")
    web.close()
