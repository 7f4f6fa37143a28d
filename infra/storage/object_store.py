"""The bucket that holds every byte: an S3-compatible object store, through boto3.

Endpoint and credentials come from the standard variables (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, ...).
Objects are named by their content wherever possible; the few that are not (commit objects) are written once,
by a conditional put.
"""

import base64
import hashlib
import time
from collections.abc import Iterator
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from boto3.s3.transfer import S3Transfer, TransferConfig
from botocore.exceptions import BotoCoreError, ClientError

from infra.errors import ServiceError, UsageError
from infra.machine.files import OnBytes, atomic_file, file_digest
from infra.records import Record
from infra.settings import Settings
from infra.storage.s3_client import CONCURRENCY, TRIES, ObjectMissing, error_code, open_client, translated

PART = 64 << 20  # bytes; larger files go up and come down in parts of this size, several at a time
UNSAFE = ", so commits are not safe; use a store with conditional writes, see `convoy doctor`"
SHA256 = "sha256"  # name of the object's metadata entry


class ObjectChanged(ServiceError):
    """An object is not the version that was asked for."""


def open_bucket(*, create: bool = False, timeout: float | None = None) -> "ObjectStore":
    """Opens the bucket that the settings name, as `ObjectStore.connect` does."""
    return ObjectStore.connect(Settings().bucket, create=create, timeout=timeout)


def parse_s3(address: str) -> tuple[str, str]:
    """Returns bucket and key of `s3://bucket/key`; the key may be empty.

    Raises:
        UsageError: it names no bucket.
    """
    bucket, _, key = address.removeprefix("s3://").partition("/")
    if not bucket:
        raise UsageError(f"{address} names no bucket; write s3://BUCKET/KEY")
    return bucket, key


class ObjectInfo(Record):
    """What the store knows of one object."""

    key: str
    size: int
    """Bytes."""

    sha256: str | None = None
    """Digest noted when the object was written; None if it was not written by Convoy, or in a listing."""

    etag: str = ""
    """The store's own mark of this version of the object."""

    modified: datetime | None = None
    """When it was written, by the store's clock; in a listing only."""


class Upload(Record):
    """A multipart upload that was neither completed nor aborted."""

    key: str
    id: str
    begun: datetime
    """By the store's clock."""


@lru_cache(maxsize=8)
def _find_bucket(client: Any, bucket: str) -> None:
    """Raises ClientError if there is no such bucket; asks the store until there is."""
    client.head_bucket(Bucket=bucket)


class ObjectStore:
    """One bucket. Safe to share between threads.

    Every method raises ServiceError, in one line that names endpoint, bucket and key, when the store fails,
    refuses or cannot be reached after bounded retries.
    """

    def __init__(self, client: Any, bucket: str) -> None:
        self._client = client
        self.bucket = bucket
        self._transfer = S3Transfer(
            client=client,
            config=TransferConfig(multipart_threshold=PART, multipart_chunksize=PART, max_concurrency=CONCURRENCY),
        )
        self._conditions_proven = False

    @classmethod
    def connect(cls, bucket: str, *, create: bool = True, timeout: float | None = None) -> "ObjectStore":
        """Open a bucket, and create it if it is not there and `create` is true; the store is asked once per process.

        Args:
            timeout: seconds that an answer may take, retries included; None for as long as a large file needs.

        Raises:
            UsageError: not a valid bucket name or endpoint address.
        """
        store = cls(open_client(timeout=timeout), bucket)
        with translated(store._where()):
            try:
                _find_bucket(store._client, bucket)
            except ClientError as error:
                if error_code(error) not in {"404", "NoSuchBucket"}:
                    raise
                if not create:
                    raise ServiceError(f"{store._where()}: no such bucket") from error
                store._create_bucket()
        return store

    @property
    def endpoint_url(self) -> str:
        """Address of the store."""
        return str(self._client.meta.endpoint_url)

    def uri(self, key: str) -> str:
        """`s3://bucket/key`."""
        return f"s3://{self.bucket}/{key}"

    def put_file(self, key: str, path: Path, *, sha256: str | None = None, on_progress: OnBytes | None = None) -> str:
        """Upload a file, a large one in concurrent parts, and return its SHA-256.

        The file is hashed first. The store checks what arrives against the SHA-256 sent with each request,
        refuses it if it differs, and keeps the digest with the object.

        Raises:
            ServiceError: also when the content is not what `sha256` promised.
        """
        size, digest = path.stat().st_size, file_digest(path)
        if sha256 is not None and digest != sha256:
            raise ServiceError(f"{path}: its SHA-256 is {digest}, expected {sha256}; not uploaded")
        with translated(self._where(key)):
            if size > PART:
                extra = {"Metadata": {SHA256: digest}, "ChecksumAlgorithm": "SHA256"}
                self._transfer.upload_file(str(path), self.bucket, key, on_progress, extra)
            else:
                with path.open("rb") as body:
                    self._client.put_object(Bucket=self.bucket, Key=key, Body=body, **_digests(digest))
                if on_progress:
                    on_progress(size)
        if size > PART and (stored := self.head(key)) and stored.size != size:  # a part went missing
            raise ServiceError(f"{self._where(key)}: {stored.size} bytes there after an upload of {size}")
        return digest

    def put_bytes(self, key: str, data: bytes) -> None:
        """Write a small object, replacing what was there."""
        with translated(self._where(key)):
            self._client.put_object(
                Bucket=self.bucket, Key=key, Body=data, **_digests(hashlib.sha256(data).hexdigest())
            )

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write a small object only if the key is free, atomically; False if it was taken.

        A lost answer is not mistaken for a lost race: when a retry finds the very bytes that an earlier try
        sent, this call wrote them. A store that ignores the condition is found out on the first success, by
        asking again.

        Raises:
            ServiceError: also when the store refuses or ignores `If-None-Match`.
        """
        created = self._put_if_absent(key, data)
        if created and not self._conditions_proven:
            if self._put_if_absent(key, data):
                raise ServiceError(f"{self._where(key)}: this store ignores If-None-Match{UNSAFE}")
            self._conditions_proven = True
        return created

    def get_bytes(self, key: str, *, etag: str | None = None) -> bytes:
        """Read a small object.

        Args:
            etag: of the version that is wanted.

        Raises:
            ObjectMissing: no such object.
            ObjectChanged: it is another version.
        """
        condition = {} if etag is None else {"IfMatch": etag}
        with translated(self._where(key)):
            for remaining in reversed(range(TRIES)):
                try:
                    answer = self._client.get_object(Bucket=self.bucket, Key=key, **condition)
                except ClientError as error:
                    if etag is None or error_code(error) not in {"412", "PreconditionFailed"}:
                        raise
                    raise ObjectChanged(f"{self._where(key)}: it has changed") from error
                if etag is not None and answer.get("ETag", etag) != etag:  # a store that ignores the condition
                    raise ObjectChanged(f"{self._where(key)}: it has changed")
                try:
                    return bytes(answer["Body"].read())
                except BotoCoreError:  # cut while reading: botocore retries requests, not their bodies
                    if not remaining:
                        raise
        raise AssertionError("unreachable")

    def get_file(self, key: str, path: Path, *, sha256: str | None = None, on_progress: OnBytes | None = None) -> None:
        """Download to `path`, which appears whole and verified, or not at all; fetched once more if its
        digest is wrong.

        Args:
            sha256: the digest to expect; None takes the one stored with the object, if any.

        Raises:
            ObjectMissing: no such object.
            ServiceError: also on a wrong digest; the message names both.
        """
        if sha256 is None and (info := self.head(key)):
            sha256 = info.sha256
        with atomic_file(path) as temporary, translated(self._where(key)):
            for try_again in (True, False):
                self._transfer.download_file(self.bucket, key, str(temporary), callback=on_progress)
                if sha256 is None or (got := file_digest(temporary)) == sha256:
                    return
                on_progress = None  # the second time round moves no new bytes
                if not try_again:
                    raise ServiceError(
                        f"{self._where(key)}: the object is damaged: its SHA-256 is {got}, expected {sha256}"
                    )

    def head(self, key: str) -> ObjectInfo | None:
        """What the store knows of an object, or None if there is none."""
        try:
            with translated(self._where(key)):
                answer = self._client.head_object(Bucket=self.bucket, Key=key)
        except ObjectMissing:
            return None
        return ObjectInfo(
            key=key,
            size=answer["ContentLength"],
            sha256=answer["Metadata"].get(SHA256),
            etag=answer.get("ETag", ""),
        )

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Every object whose key starts with `prefix`, in the order of their keys; without their SHA-256."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        with translated(self._where(prefix)):
            for page in pages:
                for item in page.get("Contents", ()):
                    yield ObjectInfo(
                        key=item["Key"], size=item["Size"], etag=item.get("ETag", ""), modified=item["LastModified"]
                    )

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens if there is none."""
        with translated(self._where(key)):
            self._client.delete_object(Bucket=self.bucket, Key=key)

    def uploads(self) -> Iterator[Upload]:
        """Every multipart upload under way, or left behind by a process that was killed: its parts take room.

        None in a store that cannot list them: there, expiring them is for the bucket's own rules.
        """
        pages = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket)
        with translated(self._where()):
            try:
                for page in pages:
                    for item in page.get("Uploads", ()):
                        yield Upload(key=item["Key"], id=item["UploadId"], begun=item["Initiated"])
            except ClientError as error:
                if error_code(error) not in {"501", "NotImplemented"}:
                    raise

    def abort_upload(self, upload: Upload) -> None:
        """Remove the parts of an upload; nothing happens if it has ended."""
        with translated(self._where(upload.key)):
            try:
                self._client.abort_multipart_upload(Bucket=self.bucket, Key=upload.key, UploadId=upload.id)
            except ClientError as error:
                if error_code(error) not in {"404", "NoSuchUpload"}:
                    raise

    def _put_if_absent(self, key: str, data: bytes) -> bool:
        with translated(self._where(key)):
            for remaining in reversed(range(TRIES)):
                try:
                    self._client.put_object(
                        Bucket=self.bucket,
                        Key=key,
                        Body=data,
                        IfNoneMatch="*",
                        **_digests(hashlib.sha256(data).hexdigest()),
                    )
                    return True
                except ClientError as error:
                    code = error_code(error)
                    if code in {"501", "NotImplemented"}:
                        raise ServiceError(f"{self._where(key)}: this store refuses If-None-Match{UNSAFE}") from error
                    if code in {"412", "PreconditionFailed"}:
                        resent = error.response["ResponseMetadata"].get("RetryAttempts", 0) > 0
                        return resent and self.get_bytes(key) == data
                    if code not in {"409", "ConditionalRequestConflict"} or not remaining:
                        raise
                    time.sleep(0.1 * (TRIES - remaining))  # another writer is at it: ask again who won
        raise AssertionError("unreachable")

    def _create_bucket(self) -> None:
        region = self._client.meta.region_name
        place = {} if region in {None, "aws-global", "us-east-1"} else {"LocationConstraint": region}
        try:
            self._client.create_bucket(Bucket=self.bucket, **({"CreateBucketConfiguration": place} if place else {}))
        except ClientError as error:
            if error_code(error) != "BucketAlreadyOwnedByYou":  # by another process, since we asked
                raise

    def _where(self, key: str = "") -> str:
        address = urlsplit(self._client.meta.endpoint_url)
        place = f"{address.scheme}://{address.hostname}" + (f":{address.port}" if address.port else "")
        return f"object storage at {place}, bucket {self.bucket}" + (f", key {key}" if key else "")


def _digests(sha256: str) -> dict[str, Any]:
    """Arguments that make the store check what arrives, and keep the digest."""
    checksum = base64.b64encode(bytes.fromhex(sha256)).decode()
    return {"Metadata": {SHA256: sha256}, "ChecksumSHA256": checksum}
