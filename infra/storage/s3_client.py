"""The S3 client: its configuration, and its exceptions turned into one line that says what to do."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NoReturn

import boto3
from boto3.exceptions import RetriesExceededError, S3UploadFailedError
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    EndpointConnectionError,
    HTTPClientError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
)

from infra.errors import Outage, ServiceError, UsageError, one_line
from infra.settings import Settings

REFUSED = {
    "403": "access denied",
    "AccessDenied": "access denied",
    "InvalidAccessKeyId": "the access key is unknown there",
    "SignatureDoesNotMatch": "the secret key is wrong",
    "ExpiredToken": "the session token has expired",
}
MISSING_KEY = {"404", "NoSuchKey"}


CONCURRENCY = 8  # requests side by side for one large object
TRIES = 5  # of one request


class ObjectMissing(ServiceError):
    """There is no object under that key."""


def open_client(addressing: str | None = None, tries: int = TRIES, timeout: float | None = None) -> Any:
    """Returns a boto3 client for the store that the standard variables name; the same one while they stay the same.

    It is configured for what every S3-compatible store understands: checksums only where we ask for them,
    since newer kinds are refused by some; the bucket in the path, since a local server has no host name a bucket.

    Args:
        addressing: another style than that of CONVOY_S3_ADDRESSING.
        tries: of each request.
        timeout: seconds that an answer may take, at most two tries together; None for as long as a large file needs.

    Raises:
        UsageError: the endpoint's address, or another of the user's settings, cannot be used.
    """
    # Credentials in a file may be renewed there: then each call reads them anew. Forked processes share no connection.
    renewed = object() if "AWS_ACCESS_KEY_ID" not in os.environ else None
    environment = frozenset((name, os.environ.get(name)) for name in list(os.environ))
    return _client((os.getpid(), renewed, environment), addressing, tries, timeout)


@lru_cache(maxsize=8)  # making one takes as long as a dozen requests
def _client(valid_for: object, addressing: str | None, tries: int, timeout: float | None) -> Any:
    settings = Settings()
    config = Config(
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        retries={"mode": "standard", "total_max_attempts": tries if timeout is None else min(tries, 2)},
        s3={"addressing_style": addressing or settings.s3_addressing},
        max_pool_connections=4 * CONCURRENCY,
        connect_timeout=5 if timeout is None else timeout / 2,
        read_timeout=60 if timeout is None else timeout / 2,
    )
    try:
        # Given, since boto3 does not read the variable where AWS_IGNORE_CONFIGURED_ENDPOINT_URLS is set.
        return boto3.session.Session().client("s3", endpoint_url=settings.s3_url, config=config)
    except (BotoCoreError, ValueError) as error:  # boto3 names the setting, and not where it is
        names = [name for name in sorted(os.environ) if name.startswith("AWS_") and "KEY" not in name]
        raise UsageError(f"object storage: {one_line(error)}; see {', '.join(names) or 'your AWS profile'}") from error


def error_code(error: ClientError) -> str:
    """The server's error code, such as `NoSuchKey`; the HTTP status where the answer had no body."""
    return str(error.response.get("Error", {}).get("Code", "unknown"))


@contextmanager
def translated(where: str) -> Iterator[None]:
    """Raise ServiceError, ObjectMissing or UsageError in place of botocore's exceptions.

    Args:
        where: endpoint, bucket and key, for people; starts each message.
    """
    try:
        yield
    except S3UploadFailedError as error:  # boto3 wraps the server's answer in it
        if isinstance(error.__context__, ClientError):
            _raise_answer(error.__context__, where)
        raise Outage(f"{where}: the upload failed: {one_line(error)}") from error
    except ClientError as error:
        _raise_answer(error, where)
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise ServiceError(f"{where}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from error
    except ParamValidationError as error:
        reason = one_line(error).partition(": Bucket name must match")[0]  # boto3 goes on with regular expressions
        raise UsageError(f"{where}: not a valid name: {reason}") from error
    except EndpointConnectionError as error:
        raise Outage(
            f"{where}: no connection; start the local servers with `convoy up`, or check AWS_ENDPOINT_URL"
        ) from error
    except (ConnectionError, HTTPClientError, RetriesExceededError) as error:
        raise Outage(f"{where}: the connection failed after several tries: {one_line(error)}") from error
    except BotoCoreError as error:
        raise ServiceError(f"{where}: {one_line(error)}") from error


def _raise_answer(error: ClientError, where: str) -> NoReturn:
    code = error_code(error)
    if code in MISSING_KEY:
        raise ObjectMissing(f"{where}: no such object") from error
    if code == "NoSuchBucket":
        raise ServiceError(f"{where}: no such bucket; create it, or name another in CONVOY_BUCKET") from error
    if code in REFUSED:
        raise ServiceError(
            f"{where}: {REFUSED[code]} ({code}); check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "and that they may read and write this bucket"
        ) from error
    message = error.response.get("Error", {}).get("Message", "")
    tries = error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0) + 1
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    kind = Outage if status >= 500 or status == 429 else ServiceError
    raise kind(f"{where}: {code} {message} (tries: {tries})".replace("\n", " ")) from error
