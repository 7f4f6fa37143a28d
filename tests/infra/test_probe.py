"""The probe's results for a real SeaweedFS, and for one that is made to ignore or refuse some requests."""

import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from io import BytesIO

import pytest
from botocore.awsrequest import AWSPreparedRequest, AWSRequest, AWSResponse
from botocore.hooks import HierarchicalEmitter
from urllib3 import HTTPResponse

from infra.errors import ServiceError, UsageError
from infra.settings import Settings
from infra.storage import probe as module
from infra.storage.bucket_layout import PROBE
from infra.storage.object_store import ObjectStore
from infra.storage.probe import Capability, probe
from infra.storage.s3_client import open_client

Meddle = Callable[..., object]
Change = Callable[[str, Meddle], None]


@pytest.fixture
def change(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[Change]:
    """Changes requests or answers of the probe's clients, before or after signing."""
    changes: list[tuple[str, Meddle]] = []

    def opened(*arguments: object, **more: object) -> object:
        client = open_client(*arguments, **more)  # type: ignore[arg-type]
        events: HierarchicalEmitter = client.meta.events
        for event, meddle in changes:
            events.register(event, meddle)
        return client

    monkeypatch.setattr(module, "open_client", opened)
    yield lambda event, meddle: changes.append((event, meddle))


def without_header(name: str) -> Meddle:
    def remove(request: AWSRequest, **_: object) -> None:
        if name in request.headers:
            del request.headers[name]

    return remove


def answering(status: int, code: str) -> Meddle:
    def answer(request: AWSPreparedRequest, **_: object) -> AWSResponse:
        body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
        return AWSResponse(request.url, status, {}, HTTPResponse(BytesIO(body), preload_content=False))

    return answer


def found(capabilities: list[Capability]) -> dict[str, str]:
    """Returns the unsupported features and the store's answers."""
    return {each.name: each.answer for each in capabilities if not each.honoured}


def left(store: ObjectStore) -> list[object]:
    return [*store.list(""), *store.uploads()]


def test_seaweedfs_honours_all_but_host_names(store: ObjectStore) -> None:
    capabilities = probe(store.bucket)
    assert list(found(capabilities)) == ["bucket in the host name"]
    assert not any(each.needed for each in capabilities if not each.honoured)
    assert left(store) == []


@pytest.mark.parametrize(
    ("event", "header", "name"),
    [
        ("before-sign.s3.PutObject", "If-None-Match", "put only if absent (If-None-Match)"),
        ("before-sign.s3.CompleteMultipartUpload", "If-None-Match", "the same for an upload in parts"),
        ("before-sign.s3.PutObject", "x-amz-checksum-sha256", "a wrong SHA-256 is refused"),
        ("before-sign.s3.PutObject", "x-amz-meta-sha256", "metadata"),
        ("before-sign.s3.GetObject", "Range", "ranges"),
    ],
)
def test_a_store_that_ignores_a_header_is_found_out(
    store: ObjectStore, change: Change, event: str, header: str, name: str
) -> None:
    change(event, without_header(header))
    assert name in found(probe(store.bucket))
    assert left(store) == []


def test_a_store_that_refuses_parts_and_lists_is_described(store: ObjectStore, change: Change) -> None:
    change("before-send.s3.CreateMultipartUpload", answering(501, "NotImplemented"))
    change("before-send.s3.ListMultipartUploads", answering(501, "NotImplemented"))
    lacking = found(probe(store.bucket))
    assert lacking["upload in parts, with SHA-256"] == "refused: NotImplemented"
    assert "uploads in parts are listed, and aborted" in lacking
    assert left(store) == []


def test_a_store_whose_clock_is_wrong_is_noticed(store: ObjectStore, change: Change) -> None:
    def late(parsed: dict[str, dict[str, dict[str, str]]], **_: object) -> None:
        wrong = datetime.now(UTC) + timedelta(hours=2)
        parsed["ResponseMetadata"]["HTTPHeaders"]["date"] = format_datetime(wrong, usegmt=True)

    change("after-call.s3.HeadBucket", late)
    assert re.fullmatch(r"it is \+(7199|7200) s off", found(probe(store.bucket))["clock as here"])


def test_what_the_probe_wrote_goes_even_when_it_is_interrupted(
    store: ObjectStore, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(**_: object) -> None:
        raise KeyboardInterrupt

    change("before-call.s3.CompleteMultipartUpload", interrupt)
    with pytest.raises(KeyboardInterrupt):
        probe(store.bucket)
    assert left(store) == []


def test_others_objects_stay(store: ObjectStore) -> None:
    store.put_bytes(f"{PROBE}somebody/else", b"kept")
    probe(store.bucket)
    assert [info.key for info in store.list("")] == [f"{PROBE}somebody/else"]


def test_a_bucket_that_cannot_be_written_is_an_error_in_one_line(store: ObjectStore, change: Change) -> None:
    change("before-send.s3.PutObject", answering(403, "AccessDenied"))
    with pytest.raises(ServiceError, match="access denied") as raised:
        probe(store.bucket)
    assert "\n" not in str(raised.value)


def test_the_bucket_goes_into_the_host_name_if_asked(s3: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVOY_S3_ADDRESSING", "virtual")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://objects.example")
    address = open_client().generate_presigned_url("get_object", Params={"Bucket": "pictures", "Key": "key"})
    assert address.startswith("https://pictures.objects.example/key")
    monkeypatch.delenv("CONVOY_S3_ADDRESSING")
    address = open_client().generate_presigned_url("get_object", Params={"Bucket": "pictures", "Key": "key"})
    assert address.startswith("https://objects.example/pictures/key")


def test_an_addressing_style_that_does_not_exist_is_the_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVOY_S3_ADDRESSING", "dns")
    with pytest.raises(UsageError, match="CONVOY_S3_ADDRESSING"):
        Settings()
