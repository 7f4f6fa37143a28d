"""Creates the bucket and waits until the local object store can be written and read."""

import time
import uuid
from collections.abc import Callable, Iterable
from functools import partial
from hashlib import md5
from itertools import count

import httpx

from infra.errors import ServiceError
from infra.machine import stopping
from infra.stack.credentials import Credentials
from infra.stack.endpoints import REGION

POLL_SECONDS = 0.1
ANSWER_SECONDS = 10.0
INDEX_PARTS = 8  # of the index of SeaweedFS's filer, with its database leveldb2
BUCKET_EXISTS = "BucketAlreadyOwnedByYou"


def make_ready(url: str, credentials: Credentials, bucket: str, *, seconds: float) -> None:
    """Creates the bucket if it is missing; writes, reads and deletes an object in each part of the store's index.

    The port answers some seconds before the store's parts have found each other; until then every read can fail with an
    internal error. And a part of the index that failed to write once, because the disk was full, refuses every request
    until the store is restarted.

    Args:
        seconds: how long to retry.

    Raises:
        ServiceError: the store refused, or kept failing.
    """
    deadline = time.monotonic() + seconds
    with httpx.Client(trust_env=False, verify=False, timeout=ANSWER_SECONDS) as client:
        ask = partial(_ask, client, credentials)
        while True:
            try:
                ask("PUT", f"{url}/{bucket}", accepted=BUCKET_EXISTS)
                for folder in _folders(bucket):
                    _round_trip(ask, f"{url}/{bucket}/{folder}/{uuid.uuid4().hex}")
                return
            except httpx.HTTPError as error:
                if time.monotonic() > deadline:
                    raise ServiceError(f"bucket {bucket} at {url} cannot be used: {error}") from None
            stopping.sleep(POLL_SECONDS)


def _folders(bucket: str) -> Iterable[str]:
    """Returns one folder per part of SeaweedFS's index, which assigns folders to parts by the MD5 of their names."""
    found: dict[int, str] = {}
    for folder in map("readiness/{}".format, count()):
        digest = md5(f"/buckets/{bucket}/{folder}".encode(), usedforsecurity=False).digest()
        found.setdefault(digest[-1] % INDEX_PARTS, folder)
        if len(found) == INDEX_PARTS:
            break
    return found.values()


def _ask(
    client: httpx.Client, credentials: Credentials, method: str, url: str, *, body: bytes = b"", accepted: str = ""
) -> httpx.Response:
    """Sends one signed request, without boto3, so that the user's settings for another store have no effect.

    Args:
        accepted: an error code that counts as success.

    Raises:
        httpx.HTTPError: no answer, or an error status.
    """
    from botocore.auth import S3SigV4Auth  # slow to import
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials as Keys

    request = AWSRequest(method=method, url=url, data=body)
    keys = Keys(credentials.access_key_id.get_secret_value(), credentials.secret_access_key.get_secret_value())
    S3SigV4Auth(keys, "s3", REGION).add_auth(request)
    answer = client.request(method, url, content=body, headers=dict(request.headers.items()))
    if not (accepted and accepted in answer.text):
        answer.raise_for_status()
    return answer


def _round_trip(ask: Callable[..., httpx.Response], url: str) -> None:
    ask("PUT", url, body=b"ready")
    try:
        ask("GET", url)
    finally:
        ask("DELETE", url)
