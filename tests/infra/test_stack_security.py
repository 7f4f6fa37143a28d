"""Without credentials, no client reads or writes objects through any port of the local object store."""

import socket
import ssl
import uuid
from collections.abc import Iterator

import httpx
import pytest

from infra.settings import Settings
from infra.stack.endpoints import Endpoints
from infra.stack.state import StackFolder
from infra.storage.object_store import ObjectStore

HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
SECRET = b"nobody may read this"
HTTP = ("master", "volume", "filer", "admin")
GRPC = ("s3_grpc", "master_grpc", "volume_grpc", "filer_grpc", "admin_grpc")
METHODS = ("GET", "HEAD", "PUT", "POST", "DELETE")


@pytest.fixture
def folder(s3: Endpoints, settings: Settings) -> StackFolder:
    return StackFolder(settings)


@pytest.fixture
def key(s3: Endpoints) -> Iterator[str]:
    """Key of an object in the session's bucket, which must be unchanged after the test."""
    store = ObjectStore.connect(s3.bucket)
    key = f"secret/{uuid.uuid4().hex}"
    store.put_bytes(key, SECRET)
    yield key
    assert store.get_bytes(key) == SECRET
    store.delete(key)


@pytest.fixture
def certified(folder: StackFolder) -> ssl.SSLContext:
    """A TLS client that has the state folder's certificate."""
    context = anonymous()
    context.load_cert_chain(folder.root / "certificate.pem", folder.root / "key.pem")
    return context


def anonymous() -> ssl.SSLContext:
    """A TLS client that trusts every server and has no certificate."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context


def refused(method: str, address: str) -> bool:
    """Checks that a request without a certificate gets no answer, or only a protocol error."""
    try:
        return httpx.request(method, address, verify=anonymous()).status_code == 400
    except httpx.TransportError:
        return True


def greeting(port: int, context: ssl.SSLContext | None) -> bytes:
    """Returns what a port sends to an HTTP/2 client (and so to a gRPC client) before it closes or stops sending."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as plain:
        try:
            connection = context.wrap_socket(plain) if context else plain
            connection.sendall(HTTP2_PREFACE)
            return connection.recv(9)
        except (ssl.SSLError, ConnectionError):
            return b""


@pytest.mark.parametrize("method", METHODS)
def test_the_s3_port_refuses_requests_without_a_signature(s3: Endpoints, key: str, method: str) -> None:
    for path in (f"{s3.bucket}/{key}", f"{s3.bucket}/new", s3.bucket, ""):
        answer = httpx.request(method, f"{s3.s3_endpoint_url}/{path}")
        assert answer.is_client_error, path
        assert SECRET not in answer.content


@pytest.mark.parametrize("name", HTTP)
def test_an_http_port_of_its_parts_speaks_to_holders_of_the_certificate_only(
    folder: StackFolder, certified: ssl.SSLContext, name: str
) -> None:
    address = f"127.0.0.1:{getattr(folder.ports, name)}"
    assert httpx.get(f"https://{address}/", verify=certified).status_code < 500
    for method in METHODS:
        assert refused(method, f"http://{address}/")
        assert refused(method, f"https://{address}/")


@pytest.mark.parametrize("name", GRPC)
def test_a_grpc_port_speaks_to_holders_of_the_certificate_only(
    folder: StackFolder, certified: ssl.SSLContext, name: str
) -> None:
    port = getattr(folder.ports, name)
    settings_frame = 4
    assert greeting(port, certified)[3] == settings_frame
    assert greeting(port, anonymous()) == b""
    assert greeting(port, None)[3:4] != bytes([settings_frame])


@pytest.mark.parametrize("method", METHODS)
def test_the_filer_wants_a_token_even_from_holders_of_the_certificate(
    folder: StackFolder, s3: Endpoints, key: str, certified: ssl.SSLContext, method: str
) -> None:
    address = f"https://127.0.0.1:{folder.ports.filer}"
    with httpx.Client(verify=certified) as client:
        for path in (f"buckets/{s3.bucket}/{key}", f"buckets/{s3.bucket}/", "etc/iam/identity.json", ""):
            answer = client.request(method, f"{address}/{path}", content=b"changed")
            assert answer.status_code == 401, path


@pytest.mark.parametrize("method", METHODS)
def test_a_volume_wants_a_token_even_from_holders_of_the_certificate(
    folder: StackFolder, key: str, certified: ssl.SSLContext, method: str
) -> None:
    address = f"https://127.0.0.1:{folder.ports.volume}"
    with httpx.Client(verify=certified) as client:
        volumes = client.get(f"{address}/status").json()["Volumes"]
        assert volumes
        for volume in volumes:
            answer = client.request(method, f"{address}/{volume['Id']},01637037d6", content=b"changed")
            assert answer.status_code == 401
