"""Probes which S3 features the configured object store supports, since documentation may describe another version.

Each feature is tried on small objects under `probe/`, which are removed even after an error.
"""

import base64
import hashlib
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from botocore.exceptions import BotoCoreError, ClientError

from infra.errors import one_line
from infra.records import Record
from infra.settings import Settings
from infra.storage import bucket_layout
from infra.storage.object_store import PART_BYTES, ObjectStore
from infra.storage.s3_client import error_code, open_client, translated

MIN_PART_BYTES = 5 << 20  # S3 accepts a smaller part only as the last one
MAX_SKEW_SECONDS = 60.0  # stores refuse requests that are a quarter of an hour off
BUCKET_PLACES = {"path": "path of an address", "virtual": "host name"}
BODY = b"what Convoy's probe wrote"


class Capability(Record):
    """A feature that a store supports or not."""

    name: str
    honoured: bool
    needed: bool
    """Whether Convoy cannot work without it."""

    without: str
    """What Convoy does, or cannot do, without it."""

    answer: str = ""
    """The store's error or wrong result."""


class _NotHonoured(Exception):
    """A store accepted a request, but did not do it."""


Attempt = tuple[str, Callable[[], None], bool, str]
"""Name of a capability, function that tries it, whether it is needed, and what Convoy does without it."""


def probe(bucket: str) -> list[Capability]:
    """Tries each capability once, in some thirty small requests and one of 5 MiB.

    Raises:
        ServiceError: the bucket cannot be reached, read or written at all.
    """
    ObjectStore.connect(bucket)
    probed = _Probe(bucket)
    try:
        with translated(f"object storage, bucket {bucket}"):
            probed.write("first")
        return [_try(*attempt) for attempt in probed.attempts()]
    finally:
        probed.clean()


def _try(name: str, attempt: Callable[[], None], needed: bool, without: str) -> Capability:
    answer = ""
    try:
        attempt()
    except _NotHonoured as error:
        answer = str(error)
    except ClientError as error:
        answer = f"refused: {error_code(error)}"
    except BotoCoreError as error:
        answer = one_line(error)
    return Capability(name=name, honoured=not answer, needed=needed, without=without, answer=answer)


class _Probe:
    """A probe of one bucket. An attempt returns if the store supports the feature, and raises if not."""

    def __init__(self, bucket: str) -> None:
        self._client = open_client()
        self._bucket = bucket
        self._prefix = bucket_layout.probe(uuid.uuid4().hex)  # another probe may run
        self._keys: set[str] = set()
        self._uploads: set[tuple[str, str]] = set()

    def attempts(self) -> Iterator[Attempt]:
        """Yields all attempts in the order of the table."""
        unneeded = "does not need it: large objects are named by their content"
        later = "finds damage when it reads, by the digest in the object's metadata"
        rule = "cannot find the parts of killed uploads: give the bucket a rule that expires them"
        large = f"files above {PART_BYTES >> 20} MiB"
        yield "put only if absent (If-None-Match)", self._conditional_put, True, "cannot commit: two writers could win"
        yield "the same for an upload in parts", self._conditional_completion, False, unneeded
        yield "SHA-256 with a put", self._right_checksum, True, "cannot write: it sends one with each object"
        yield "a wrong SHA-256 is refused", self._wrong_checksum, False, later
        yield "metadata", self._metadata, True, "cannot verify what it reads"
        yield "upload in parts, with SHA-256", self._multipart, True, f"cannot store {large}"
        yield "uploads in parts are listed, and aborted", self._listed_upload, False, rule
        yield "ranges", self._range, True, f"cannot read {large}"
        yield "a listing shows what was just written", self._listing, True, "could treat a stored checkpoint as missing"
        for style, place in BUCKET_PLACES.items():
            chosen, attempt = Settings().s3_addressing == style, partial(self._addressing, style)
            yield f"bucket in the {place}", attempt, chosen, "CONVOY_S3_ADDRESSING chooses"
        yield "clock as here", self._clock, False, "judges age by the store's clock; far off, requests are refused"

    def write(self, name: str, **more: Any) -> str:
        """Writes a small object and returns its key."""
        key = self._prefix + name
        self._keys.add(key)
        self._client.put_object(Bucket=self._bucket, Key=key, Body=BODY, **more)
        return key

    def clean(self) -> None:
        """Deletes everything that this probe wrote, as far as the store permits."""
        for key, upload in self._uploads:
            with suppress(ClientError, BotoCoreError):
                self._client.abort_multipart_upload(Bucket=self._bucket, Key=key, UploadId=upload)
        for key in self._keys:
            with suppress(ClientError, BotoCoreError):
                self._client.delete_object(Bucket=self._bucket, Key=key)

    def _conditional_put(self) -> None:
        self.write("once", IfNoneMatch="*")
        with _refused(412):
            self.write("once", IfNoneMatch="*")

    def _conditional_completion(self) -> None:
        upload = self._begin(self.write("taken"))
        part = self._client.upload_part(**upload, PartNumber=1, Body=BODY)
        parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
        with _refused(412):
            self._client.complete_multipart_upload(**upload, MultipartUpload=parts, IfNoneMatch="*")

    def _right_checksum(self) -> None:
        self.write("right", ChecksumSHA256=_checksum(BODY))

    def _wrong_checksum(self) -> None:
        with _refused(400):
            self.write("wrong", ChecksumSHA256=_checksum(b"something else"))

    def _metadata(self) -> None:
        key = self.write("described", Metadata={"sha256": "0123"})
        found = self._client.head_object(Bucket=self._bucket, Key=key)["Metadata"]
        _expect(found.get("sha256") == "0123", f"it has {found}")

    def _multipart(self) -> None:
        key, bodies = self._prefix + "parts", (bytes(MIN_PART_BYTES), BODY)
        self._keys.add(key)
        upload = self._begin(key, ChecksumAlgorithm="SHA256")
        parts = []
        for number, body in enumerate(bodies, 1):
            digest = _checksum(body)
            part = self._client.upload_part(**upload, PartNumber=number, Body=body, ChecksumSHA256=digest)
            parts.append({"PartNumber": number, "ETag": part["ETag"], "ChecksumSHA256": digest})
        self._client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
        size = self._client.head_object(Bucket=self._bucket, Key=key)["ContentLength"]
        _expect(size == sum(map(len, bodies)), f"{size} bytes arrived")

    def _listed_upload(self) -> None:
        upload = self._begin(self._prefix + "never-completed")
        _expect(upload["UploadId"] in self._listed_uploads(), "it is not in the list")
        self._client.abort_multipart_upload(**upload)
        _expect(upload["UploadId"] not in self._listed_uploads(), "it is still in the list after the abort")

    def _range(self) -> None:
        answer = self._client.get_object(Bucket=self._bucket, Key=self.write("whole"), Range="bytes=5-11")
        found = answer["Body"].read()
        _expect(found == BODY[5:12], f"{len(found)} bytes arrived instead of 7")

    def _listing(self) -> None:
        key = self.write("listed")
        _expect(key in self._listed(), "it is not listed")
        self._client.delete_object(Bucket=self._bucket, Key=key)
        _expect(key not in self._listed(), "it is still there after the deletion")

    def _addressing(self, style: str) -> None:
        client = open_client(style, tries=1)
        hosts: list[str] = []
        client.meta.events.register("before-send.s3", lambda request, **_: hosts.append(urlsplit(request.url).netloc))
        client.head_object(Bucket=self._bucket, Key=self.write("addressed"))
        in_host = hosts[0].startswith(f"{self._bucket}.")
        _expect(in_host == (style == "virtual"), f"{hosts[0]} has no name per bucket" if not in_host else hosts[0])

    def _clock(self) -> None:
        headers = self._client.head_bucket(Bucket=self._bucket)["ResponseMetadata"]["HTTPHeaders"]
        skew = (parsedate_to_datetime(headers["date"]) - datetime.now(UTC)).total_seconds() if "date" in headers else 0
        _expect(abs(skew) <= MAX_SKEW_SECONDS, f"it is {skew:+.0f} s off")

    def _begin(self, key: str, **more: Any) -> dict[str, str]:
        upload = self._client.create_multipart_upload(Bucket=self._bucket, Key=key, **more)["UploadId"]
        self._uploads.add((key, upload))
        return {"Bucket": self._bucket, "Key": key, "UploadId": upload}

    def _listed_uploads(self) -> set[str]:
        answer = self._client.list_multipart_uploads(Bucket=self._bucket, Prefix=self._prefix)
        return {each["UploadId"] for each in answer.get("Uploads", ())}

    def _listed(self) -> set[str]:
        answer = self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix)
        return {each["Key"] for each in answer.get("Contents", ())}


def _expect(so: bool, otherwise: str) -> None:
    if not so:
        raise _NotHonoured(otherwise)


@contextmanager
def _refused(status: int) -> Iterator[None]:
    """Raises _NotHonoured unless the block's request is refused with this HTTP status."""
    try:
        yield
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] != status:
            raise
        return
    raise _NotHonoured("it was accepted")


def _checksum(data: bytes) -> str:
    return base64.b64encode(hashlib.sha256(data).digest()).decode()
