"""The object store, against a real SeaweedFS."""

import hashlib
import io
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from botocore.awsrequest import AWSPreparedRequest, AWSRequest, AWSResponse
from botocore.exceptions import ConnectionClosedError
from urllib3 import HTTPResponse

from infra.errors import ServiceError, UsageError
from infra.stack.endpoints import Endpoints
from infra.storage.object_store import PART_BYTES, ObjectStore
from infra.storage.s3_client import ObjectMissing


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_file_comes_back_as_it_went_up(store: ObjectStore, tmp_path: Path) -> None:
    source, back = tmp_path / "source", tmp_path / "deep" / "back"
    source.write_bytes(os.urandom(300_000))
    moved: list[int] = []
    digest = store.put_file("some/key", source, on_progress=moved.append)
    assert digest == _sha256(source.read_bytes())
    assert sum(moved) == 300_000
    info = store.head("some/key")
    assert info is not None and info.size == 300_000 and info.sha256 == digest
    store.get_file("some/key", back, sha256=digest)
    assert back.read_bytes() == source.read_bytes()
    assert store.uri("some/key") == f"s3://{store.bucket}/some/key"


def test_a_large_file_goes_up_in_parts_and_comes_back_whole(store: ObjectStore, tmp_path: Path) -> None:
    source, back = tmp_path / "source", tmp_path / "back"
    block = os.urandom(1 << 20)
    with source.open("wb") as file:
        for number in range(PART_BYTES // len(block) + 3):
            file.write(number.to_bytes(8, "big") + block[8:])
    up: list[int] = []
    down: list[int] = []
    digest = store.put_file("large", source, on_progress=up.append)
    info = store.head("large")
    assert info is not None and info.sha256 == digest and info.size == source.stat().st_size
    assert info.etag.strip('"').endswith("-2")  # the ETag of an upload in two parts
    store.get_file("large", back, sha256=digest, on_progress=down.append)
    assert _sha256(back.read_bytes()) == digest
    assert sum(up) == sum(down) == info.size


def test_a_file_that_is_not_what_was_promised_is_not_uploaded(store: ObjectStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"changed meanwhile")
    with pytest.raises(ServiceError) as raised:
        store.put_file("key", source, sha256=_sha256(b"as it was"))
    assert _sha256(b"as it was") in str(raised.value) and _sha256(b"changed meanwhile") in str(raised.value)
    assert store.head("key") is None


def test_a_damaged_object_is_refused_with_both_digests_and_leaves_no_file(store: ObjectStore, tmp_path: Path) -> None:
    store.put_bytes("key", b"damaged")
    with pytest.raises(ServiceError) as raised:
        store.get_file("key", tmp_path / "file", sha256=_sha256(b"good"))
    message = str(raised.value)
    assert _sha256(b"good") in message and _sha256(b"damaged") in message and "\n" not in message
    assert list(tmp_path.iterdir()) == []


def test_a_failed_download_keeps_the_file_that_was_there(store: ObjectStore, tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")
    with pytest.raises(ObjectMissing):
        store.get_file("nothing", target, sha256=_sha256(b"new"))
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_an_empty_file_is_a_file(store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    digest = store.put_file("empty", tmp_path / "empty")
    store.get_file("empty", tmp_path / "back", sha256=digest)
    assert (tmp_path / "back").read_bytes() == b""


def test_small_objects_are_read_listed_and_deleted(store: ObjectStore) -> None:
    for key in ("a/1", "a/2", "b/1"):
        store.put_bytes(key, key.encode())
    assert store.get_bytes("a/2") == b"a/2"
    assert [(info.key, info.size) for info in store.list("a/")] == [("a/1", 3), ("a/2", 3)]
    store.delete("a/1")
    store.delete("a/1")
    assert store.head("a/1") is None
    with pytest.raises(ObjectMissing, match="key a/1: no such object"):
        store.get_bytes("a/1")


@pytest.mark.long
def test_of_many_writers_at_once_exactly_one_puts_the_commit(store: ObjectStore) -> None:
    writers = 8
    together = threading.Barrier(writers)

    def write(number: int) -> bool:
        together.wait()
        return store.put_if_absent("commit", f"writer {number}".encode())

    with ThreadPoolExecutor(writers) as pool:
        won = list(pool.map(write, range(writers)))
    assert won.count(True) == 1
    assert store.get_bytes("commit") == f"writer {won.index(True)}".encode()
    assert store.put_if_absent("commit", b"too late") is False


@contextmanager
def _meddling(store: ObjectStore, event: str, meddle: Callable[..., object]) -> Iterator[None]:
    """Changes requests to the real store, or its answers."""
    events = store._client.meta.events
    events.register(event, meddle)
    try:
        yield
    finally:
        events.unregister(event, meddle)


def test_bytes_that_change_on_their_way_are_refused(store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1000))

    def flip(request: AWSPreparedRequest, **_: object) -> None:
        request.body = b"x" + bytes(999)

    with _meddling(store, "before-send.s3.PutObject", flip):
        for put in (
            lambda: store.put_file("key", tmp_path / "file"),
            lambda: store.put_bytes("key", bytes(1000)),
            lambda: store.put_if_absent("key", bytes(1000)),
        ):
            with pytest.raises(ServiceError, match="BadDigest"):
                put()
    assert store.head("key") is None


def test_a_part_that_changes_on_its_way_is_refused(store: ObjectStore, tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.truncate(PART_BYTES + 1000)

    def flip(request: AWSPreparedRequest, **_: object) -> None:
        if int(request.headers["Content-Length"]) == 1000:
            request.body = b"x" + bytes(999)

    with _meddling(store, "before-send.s3.UploadPart", flip), pytest.raises(ServiceError, match="BadDigest"):
        store.put_file("key", tmp_path / "file")
    assert store.head("key") is None


def test_a_lost_answer_is_not_taken_for_a_lost_race(store: ObjectStore) -> None:
    lost: list[int] = []

    def lose_first(request: AWSPreparedRequest, **_: object) -> None:
        if not lost:
            lost.append(store._client._endpoint.http_session.send(request).status_code)
            raise ConnectionClosedError(endpoint_url=request.url)

    with _meddling(store, "before-send.s3.PutObject", lose_first):
        assert store.put_if_absent("commit", b"mine") is True
    assert lost == [200]
    lost.clear()
    with _meddling(store, "before-send.s3.PutObject", lose_first):
        assert store.put_if_absent("commit", b"not mine") is False
    assert lost == [412] and store.get_bytes("commit") == b"mine"


def test_a_conflict_with_another_writer_is_settled_by_asking_again(store: ObjectStore) -> None:
    conflicts: list[str] = []

    def conflict_once(request: AWSPreparedRequest, **_: object) -> AWSResponse | None:
        if conflicts:
            return None
        conflicts.append(request.url)
        return _conflict(request)

    with _meddling(store, "before-send.s3.PutObject", conflict_once):
        assert store.put_if_absent("commit", b"mine") is True
    assert len(conflicts) == 1 and store.get_bytes("commit") == b"mine"


def test_a_lost_answer_and_then_a_conflict_with_oneself_are_not_taken_for_a_lost_race(store: ObjectStore) -> None:
    """The store still works on the first request when the second one comes."""
    sent: list[str] = []

    def meddle(request: AWSPreparedRequest, **_: object) -> AWSResponse | None:
        sent.append(request.url)
        if len(sent) == 1:
            store._client._endpoint.http_session.send(request)
            raise ConnectionClosedError(endpoint_url=request.url)
        return _conflict(request) if len(sent) == 2 else None

    with _meddling(store, "before-send.s3.PutObject", meddle):
        assert store.put_if_absent("commit", b"mine") is True
    assert len(sent) > 2 and store.get_bytes("commit") == b"mine"


def test_a_store_that_ignores_conditions_is_found_out(store: ObjectStore) -> None:
    def ignore(request: AWSRequest, **_: object) -> None:
        del request.headers["If-None-Match"]

    with (
        _meddling(store, "before-sign.s3.PutObject", ignore),
        pytest.raises(ServiceError, match="ignores If-None-Match"),
    ):
        store.put_if_absent("commit", b"mine")


def test_a_disturbed_proof_does_not_accuse_the_store(store: ObjectStore) -> None:
    """The request that is to prove that the store heeds the condition is answered with 503, and sent again."""
    sent: list[str] = []

    def busy_for_the_second(request: AWSPreparedRequest, **_: object) -> AWSResponse | None:
        sent.append(request.url)
        if len(sent) != 2:
            return None
        return AWSResponse(request.url, 503, {}, HTTPResponse(io.BytesIO(b""), preload_content=False))

    with _meddling(store, "before-send.s3.PutObject", busy_for_the_second):
        assert store.put_if_absent("commit", b"mine") is True
    assert len(sent) == 3 and store.get_bytes("commit") == b"mine"


def test_an_outage_during_the_proof_does_not_hide_that_the_object_was_written(store: ObjectStore) -> None:
    sent: list[str] = []

    def away_after_the_first(request: AWSPreparedRequest, **_: object) -> AWSResponse | None:
        sent.append(request.url)
        if len(sent) == 1:
            return None
        return AWSResponse(request.url, 400, {}, HTTPResponse(io.BytesIO(b""), preload_content=False))

    def ignore(request: AWSRequest, **_: object) -> None:
        del request.headers["If-None-Match"]

    with _meddling(store, "before-send.s3.PutObject", away_after_the_first):
        assert store.put_if_absent("first", b"mine") is True
    assert store.get_bytes("first") == b"mine"
    with (
        _meddling(store, "before-sign.s3.PutObject", ignore),
        pytest.raises(ServiceError, match="ignores If-None-Match"),
    ):
        store.put_if_absent("second", b"mine")


def test_an_object_that_changes_while_its_parts_are_fetched_is_an_error_of_one_line(
    store: ObjectStore, tmp_path: Path
) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.truncate(PART_BYTES + 1000)
    store.put_file("key", tmp_path / "file")

    def changed(request: AWSPreparedRequest, **_: object) -> AWSResponse:
        body = b"<Error><Code>PreconditionFailed</Code><Message>another ETag</Message></Error>"
        return AWSResponse(request.url, 412, {}, HTTPResponse(io.BytesIO(body), preload_content=False))

    with (
        _meddling(store, "before-send.s3.GetObject", changed),
        pytest.raises(ServiceError, match=r"key key: .*expected ETag"),
    ):
        store.get_file("key", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def _conflict(request: AWSPreparedRequest) -> AWSResponse:
    body = b"<Error><Code>ConditionalRequestConflict</Code><Message>again</Message></Error>"
    return AWSResponse(request.url, 409, {}, HTTPResponse(io.BytesIO(body), preload_content=False))


def _not_implemented(request: AWSPreparedRequest, **_: object) -> AWSResponse:
    body = b"<Error><Code>NotImplemented</Code><Message>A header implies what is not there</Message></Error>"
    return AWSResponse(request.url, 501, {}, HTTPResponse(io.BytesIO(body), preload_content=False))


def test_a_store_that_refuses_conditions_is_named(store: ObjectStore) -> None:
    with (
        _meddling(store, "before-send.s3.PutObject", _not_implemented),
        pytest.raises(ServiceError, match="refuses If-None-Match"),
    ):
        store.put_if_absent("commit", b"mine")


def test_a_store_that_cannot_list_uploads_has_none(store: ObjectStore) -> None:
    with _meddling(store, "before-send.s3.ListMultipartUploads", _not_implemented):
        assert list(store.uploads()) == []


def test_an_answer_that_is_cut_is_read_again(store: ObjectStore) -> None:
    store.put_bytes("key", b"whole")
    cuts: list[str] = []

    def cut_once(request: AWSPreparedRequest, **_: object) -> AWSResponse | None:
        if cuts:
            return None
        cuts.append(request.url)
        raw = HTTPResponse(io.BytesIO(b"wh"), headers={"Content-Length": "5"}, preload_content=False)
        return AWSResponse(request.url, 200, {"Content-Length": "5"}, raw)

    with _meddling(store, "before-send.s3.GetObject", cut_once):
        assert store.get_bytes("key") == b"whole"
    assert len(cuts) == 1


def test_refused_credentials_are_named_in_one_line(
    s3: Endpoints, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-but-secret")
    with pytest.raises(ServiceError) as raised:
        ObjectStore.connect(store.bucket)
    message = str(raised.value)
    assert str(s3.s3_endpoint_url) in message and store.bucket in message
    assert "AWS_SECRET_ACCESS_KEY" in message and "wrong-but-secret" not in message and "\n" not in message


def test_missing_credentials_are_named_in_one_line(
    s3: Endpoints, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(ServiceError, match="no credentials; set AWS_ACCESS_KEY_ID"):
        ObjectStore.connect("any-bucket")


def test_a_store_that_does_not_answer_is_named_with_what_to_do(s3: Endpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:hidden@127.0.0.1:9")
    with pytest.raises(ServiceError) as raised:
        ObjectStore.connect("any-bucket")
    message = str(raised.value)
    assert "http://127.0.0.1:9, bucket any-bucket" in message and "convoy up" in message
    assert "hidden" not in message and "\n" not in message


def test_an_endpoint_that_is_no_address_is_the_users_mistake(s3: Endpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost 8333")
    with pytest.raises(UsageError, match="AWS_ENDPOINT_URL"):
        ObjectStore.connect("any-bucket")


def test_a_bucket_that_must_exist_is_not_created(s3: Endpoints) -> None:
    with pytest.raises(ServiceError, match="no such bucket"):
        ObjectStore.connect("never-created", create=False)
    with pytest.raises(ServiceError, match="no such bucket"):
        ObjectStore.connect("never-created", create=False)


def test_connecting_creates_the_bucket_and_does_so_once(s3: Endpoints) -> None:
    first = ObjectStore.connect("created-once")
    first.put_bytes("key", b"kept")
    assert ObjectStore.connect("created-once").get_bytes("key") == b"kept"
    first.delete("key")


def test_a_bad_bucket_name_is_the_users_mistake(s3: Endpoints) -> None:
    with pytest.raises(UsageError, match="invalid name") as refused:
        ObjectStore.connect("not/a bucket")
    assert "regex" not in str(refused.value)


class _Stopped(BaseException):
    """As `infra.machine.stopping.Stopped`, which is no Exception either."""


@pytest.mark.long
def test_what_is_raised_in_a_progress_callback_ends_the_transfer(store: ObjectStore, tmp_path: Path) -> None:
    """boto3 calls it in its own threads, which take only an Exception for a failure."""
    with (tmp_path / "file").open("wb") as file:
        file.truncate(PART_BYTES + 1000)
    store.put_file("large", tmp_path / "file")
    store.put_bytes("small", bytes(1000))

    def stop(_: int) -> None:
        raise _Stopped

    for key in ("small", "large"):
        with pytest.raises(_Stopped):
            store.get_file(key, tmp_path / "got", on_progress=stop)
    assert not (tmp_path / "got").exists()
    with pytest.raises(_Stopped):
        store.put_file("new", tmp_path / "file", on_progress=stop)
    assert store.head("new") is None


@pytest.mark.parametrize("arrives", [True, False])
def test_an_upload_whose_last_answer_was_lost_is_done(store: ObjectStore, tmp_path: Path, arrives: bool) -> None:
    """As at a store that has forgotten a completed upload when the request is repeated."""
    (tmp_path / "file").write_bytes(b"y" * (PART_BYTES + 1000))
    unknown = b"<Error><Code>NoSuchUpload</Code><Message>The specified upload does not exist</Message></Error>"

    def meddle(request: AWSPreparedRequest, **_: object) -> AWSResponse:
        if arrives:
            store._client._endpoint.http_session.send(request)
        raw = HTTPResponse(io.BytesIO(unknown), preload_content=False, status=404)
        return AWSResponse(request.url, 404, {}, raw)

    with _meddling(store, "before-send.s3.CompleteMultipartUpload", meddle):
        if arrives:
            store.put_file("key", tmp_path / "file")
            assert store.get_bytes("key") == (tmp_path / "file").read_bytes()
        else:
            with pytest.raises(ServiceError, match="NoSuchUpload"):
                store.put_file("key", tmp_path / "file")
