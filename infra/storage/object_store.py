"""Reads and writes the bucket that holds all data, in an S3-compatible object store, through boto3.

Endpoint and credentials come from the standard variables (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, ...).
Most objects are named by their content; the others (commit objects) are written once, by a conditional put.
"""

import base64
import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from urllib.parse import urlsplit

from boto3.exceptions import S3UploadFailedError
from boto3.s3.transfer import S3Transfer, TransferConfig
from botocore.exceptions import BotoCoreError, ClientError
from pydantic import BaseModel, ValidationError

from infra.errors import ServiceError, UsageError
from infra.machine.files import OnBytes, atomic_file, file_digest
from infra.records import Record
from infra.settings import Settings
from infra.storage.s3_client import CONCURRENCY, TRIES, ObjectMissing, error_code, open_client, translated

R = TypeVar("R", bound=BaseModel)

PART_BYTES = 64 << 20  # larger files are uploaded and downloaded in parts of this size, several at a time
UNSAFE = ", so commits are not safe; use a store with conditional writes, see `convoy doctor`"
SHA256 = "sha256"  # an entry of the object's metadata


class ObjectChanged(ServiceError):
    """An object is not the requested version."""


def open_bucket(*, create: bool = False, timeout: float | None = None) -> "ObjectStore":
    """Opens the bucket that the settings name, as `ObjectStore.connect` does."""
    return ObjectStore.connect(Settings().bucket, create=create, timeout=timeout)


def parse_s3(address: str) -> tuple[str, str]:
    """Returns bucket and key of `s3://bucket/key`; the key may be empty.

    Raises:
        UsageError: the address names no bucket.
    """
    bucket, _, key = address.removeprefix("s3://").partition("/")
    if not bucket:
        raise UsageError(f"{address} names no bucket; write s3://BUCKET/KEY")
    return bucket, key


class ObjectInfo(Record):
    """The store's description of one object."""

    key: str
    size: int
    """Bytes."""

    sha256: str | None = None
    """Digest stored with the object; None in a listing, or if Convoy did not write the object."""

    etag: str = ""
    """The store's identifier for this version of the object."""

    modified: datetime | None = None
    """Time of writing, by the store's clock; only in a listing."""


class Upload(Record):
    """A multipart upload that was neither completed nor aborted."""

    key: str
    id: str
    begun: datetime
    """By the store's clock."""


@lru_cache(maxsize=8)
def _find_bucket(client: Any, bucket: str) -> None:
    """Raises ClientError if there is no such bucket; once it exists, the store is not asked again."""
    client.head_bucket(Bucket=bucket)


class ObjectStore:
    """One bucket. Threads may share it.

    Every method raises ServiceError, in one line that names endpoint, bucket and key, if the store fails, refuses or
    cannot be reached after a limited number of retries.
    """

    def __init__(self, client: Any, bucket: str) -> None:
        self._client = client
        self.bucket = bucket
        self._transfer = S3Transfer(
            client=client,
            config=TransferConfig(
                multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=CONCURRENCY
            ),
        )
        self._conditions_proven = False

    @classmethod
    def connect(cls, bucket: str, *, create: bool = True, timeout: float | None = None) -> "ObjectStore":
        """Opens a bucket, and creates it if it is missing and `create` is true; asks the store once per process.

        Args:
            timeout: seconds that an answer may take, retries included; None sets limits that suit large files.

        Raises:
            UsageError: the bucket name or endpoint address is invalid.
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
        """Returns the store's address."""
        return str(self._client.meta.endpoint_url)

    def uri(self, key: str) -> str:
        """Returns `s3://bucket/key`."""
        return f"s3://{self.bucket}/{key}"

    def put_file(self, key: str, path: Path, *, sha256: str | None = None, on_progress: OnBytes | None = None) -> str:
        """Uploads a file, a large one in concurrent parts, and returns its SHA-256.

        The file is hashed first. The store compares what arrives with the SHA-256 of each request, refuses it if it
        differs, and keeps the digest with the object.

        Raises:
            ServiceError: also if the file's digest is not `sha256`.
        """
        size, digest = path.stat().st_size, file_digest(path)
        if sha256 is not None and digest != sha256:
            raise ServiceError(f"{path}: its SHA-256 is {digest}, expected {sha256}; not uploaded")
        with translated(self._where(key)):
            if size > PART_BYTES:
                self._upload_parts(key, path, on_progress, ObjectInfo(key=key, size=size, sha256=digest))
            else:
                with path.open("rb") as body:
                    self._client.put_object(Bucket=self.bucket, Key=key, Body=body, **_digests(digest))
                if on_progress:
                    on_progress(size)
        if size > PART_BYTES and (stored := self.head(key)) and stored.size != size:  # a part was lost
            raise ServiceError(f"{self._where(key)}: {stored.size} bytes are stored after an upload of {size}")
        return digest

    def _upload_parts(self, key: str, path: Path, on_progress: OnBytes | None, sent: ObjectInfo) -> None:
        extra = {"Metadata": {SHA256: str(sent.sha256)}, "ChecksumAlgorithm": "SHA256"}
        try:
            with _raising(on_progress) as callback:
                self._transfer.upload_file(str(path), self.bucket, key, callback, extra)
        except S3UploadFailedError as error:
            # If the answer to the last request was lost, the store does not know the upload any more at the next try.
            stored = self.head(key) if "NoSuchUpload" in str(error) else None
            if not stored or (stored.size, stored.sha256) != (sent.size, sent.sha256):
                raise

    def put_bytes(self, key: str, data: bytes) -> None:
        """Writes a small object; replaces an existing one."""
        digest = hashlib.sha256(data).hexdigest()
        with translated(self._where(key)):
            self._client.put_object(Bucket=self.bucket, Key=key, Body=data, **_digests(digest))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Writes a small object atomically if there is none under that key; returns whether it did.

        A lost answer does not count as a lost race: if a retry finds the same bytes as it sends, this call wrote them.
        After the first success the request is repeated, to detect a store that ignores the condition.

        Raises:
            ServiceError: also if the store refuses or ignores `If-None-Match`.
        """
        created = self._put_if_absent(key, data)
        if created and not self._conditions_proven:
            try:
                ignored = self._put_if_absent(key, data, again=True)
            except ServiceError:  # the object is written; the next call will be the proof
                return True
            if ignored:
                raise ServiceError(f"{self._where(key)}: this store ignores If-None-Match{UNSAFE}")
            self._conditions_proven = True
        return created

    def get_bytes(self, key: str, *, etag: str | None = None) -> bytes:
        """Reads a small object.

        Args:
            etag: the expected version; None accepts any.

        Raises:
            ObjectMissing: there is no such object.
            ObjectChanged: the object has another version.
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
                except BotoCoreError:  # the connection broke: botocore retries requests, but not the reading of bodies
                    if not remaining:
                        raise
        raise AssertionError("unreachable")

    def read_record(self, key: str, kind: type[R], remedy: str = "") -> R | None:
        """Reads a record that is stored as JSON; returns None if there is none.

        Args:
            remedy: what helps if the record is damaged; without it, a damaged one counts as missing.

        Raises:
            ServiceError: the record is damaged.
        """
        try:
            return kind.model_validate_json(self.get_bytes(key))
        except ObjectMissing:
            return None
        except ValidationError as error:
            if not remedy:
                return None
            raise ServiceError(f"{self.uri(key)} is damaged; {remedy}") from error

    def get_file(
        self, key: str, path: Path, *, sha256: str | None = None, on_progress: OnBytes | None = None
    ) -> ObjectInfo | None:
        """Downloads an object to `path`, which appears complete and verified, or not at all.

        A download with a wrong digest is repeated once.

        Args:
            sha256: the expected digest; None takes the one stored with the object, if any.

        Returns:
            With `sha256` None, the store's description of the object just before the download.

        Raises:
            ObjectMissing: there is no such object.
            ServiceError: also on a wrong digest; the message names both digests.
        """
        info = self.head(key) if sha256 is None else None
        sha256 = info.sha256 if info else sha256
        with atomic_file(path) as temporary, translated(self._where(key)):
            for _ in range(2):
                with _raising(on_progress) as callback:
                    self._transfer.download_file(self.bucket, key, str(temporary), callback=callback)
                if sha256 is None or (got := file_digest(temporary)) == sha256:
                    return info
                on_progress = None  # the second download moves no new bytes
            raise ServiceError(f"{self._where(key)}: damaged: its SHA-256 is {got}, expected {sha256}")

    @contextmanager
    def fetched(self, key: str, *, sha256: str | None = None, folder: Path | None = None) -> "Iterator[Path]":
        """Yields a temporary file that holds an object, downloaded as by `get_file`.

        Args:
            folder: where it is put; None: the system's folder for temporary files.
        """
        with TemporaryDirectory(dir=folder) as temporary:
            path = Path(temporary, key.rpartition("/")[2])
            self.get_file(key, path, sha256=sha256)
            yield path

    def head(self, key: str) -> ObjectInfo | None:
        """Returns the store's description of an object, or None if there is no such object."""
        try:
            with translated(self._where(key)):
                answer = self._client.head_object(Bucket=self.bucket, Key=key)
        except ObjectMissing:
            return None
        digest, etag = answer["Metadata"].get(SHA256), answer.get("ETag", "")
        return ObjectInfo(key=key, size=answer["ContentLength"], sha256=digest, etag=etag)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yields every object whose key starts with `prefix`, in the order of keys, without SHA-256."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        with translated(self._where(prefix)):
            for page in pages:
                for item in page.get("Contents", ()):
                    yield ObjectInfo(
                        key=item["Key"], size=item["Size"], etag=item.get("ETag", ""), modified=item["LastModified"]
                    )

    def delete(self, key: str) -> None:
        """Deletes an object if it exists."""
        with translated(self._where(key)):
            self._client.delete_object(Bucket=self.bucket, Key=key)

    def uploads(self) -> Iterator[Upload]:
        """Yields multipart uploads that run or that a killed process has left; their parts take space.

        Yields none in a store that cannot list them; there, a lifecycle rule of the bucket has to expire them.
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
        """Deletes the parts of an upload, unless it has ended."""
        with translated(self._where(upload.key)):
            try:
                self._client.abort_multipart_upload(Bucket=self.bucket, Key=upload.key, UploadId=upload.id)
            except ClientError as error:
                if error_code(error) not in {"404", "NoSuchUpload"}:
                    raise

    def _put_if_absent(self, key: str, data: bytes, *, again: bool = False) -> bool:
        """Returns whether this call wrote the object.

        Args:
            again: whether an earlier call wrote these bytes, so that to find them proves nothing.
        """
        condition = {"IfNoneMatch": "*", **_digests(hashlib.sha256(data).hexdigest())}
        resent = False
        with translated(self._where(key)):
            for remaining in reversed(range(TRIES)):
                try:
                    self._client.put_object(Bucket=self.bucket, Key=key, Body=data, **condition)
                    return True
                except ClientError as error:
                    code = error_code(error)
                    resent |= error.response["ResponseMetadata"].get("RetryAttempts", 0) > 0
                    if code in {"501", "NotImplemented"}:
                        raise ServiceError(f"{self._where(key)}: this store refuses If-None-Match{UNSAFE}") from error
                    if code in {"412", "PreconditionFailed"}:
                        return resent and not again and self.get_bytes(key) == data
                    if code not in {"409", "ConditionalRequestConflict"} or not remaining:
                        raise
                    time.sleep(0.1 * (TRIES - remaining))  # another writer is writing it: find out which one won
        raise AssertionError("unreachable")

    def _create_bucket(self) -> None:
        region = self._client.meta.region_name
        place = {} if region in {None, "aws-global", "us-east-1"} else {"LocationConstraint": region}
        try:
            self._client.create_bucket(Bucket=self.bucket, **({"CreateBucketConfiguration": place} if place else {}))
        except ClientError as error:
            if error_code(error) != "BucketAlreadyOwnedByYou":  # another process created it meanwhile
                raise

    def _where(self, key: str = "") -> str:
        address = urlsplit(self._client.meta.endpoint_url)
        place = f"{address.scheme}://{address.hostname}" + (f":{address.port}" if address.port else "")
        return f"object storage at {place}, bucket {self.bucket}" + (f", key {key}" if key else "")


@contextmanager
def _raising(on_progress: OnBytes | None) -> Iterator[OnBytes | None]:
    """Yields a callback for boto3; what `on_progress` raises ends the transfer, and is raised at the end of the block.

    boto3 calls it in its own threads, which would lose Stopped and report the transfer as done.
    """
    raised: list[BaseException] = []

    def callback(size: int) -> None:
        assert on_progress
        try:
            on_progress(size)
        except BaseException as error:
            raised.append(error)
            raise RuntimeError("the caller ends the transfer") from error

    try:
        yield on_progress and callback
    finally:
        if raised:
            raise raised[0]


def _digests(sha256: str) -> dict[str, Any]:
    """Returns request arguments that make the store verify the content and keep its digest."""
    checksum = base64.b64encode(bytes.fromhex(sha256)).decode()
    return {"Metadata": {SHA256: sha256}, "ChecksumSHA256": checksum}
