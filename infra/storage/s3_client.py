"""Configures the S3 client, and translates its exceptions into one line that says what to do."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any, NoReturn

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
from botocore.loaders import Loader, create_loader
from botocore.session import Session
from s3transfer.exceptions import S3DownloadFailedError, S3ValidationError

from infra.errors import Outage, ServiceError, UsageError, one_line
from infra.settings import Settings

REFUSED = {
    "403": "access denied",
    "AccessDenied": "access denied",
    "InvalidAccessKeyId": "the access key is unknown there",
    "SignatureDoesNotMatch": "the secret key is wrong",
    "ExpiredToken": "the session token has expired",
}
CONCURRENCY = 8  # parallel requests for one large object
TRIES = 5  # per request
OF_OTHER_LIBRARIES = ("MLFLOW_", "PREFECT_", "TORCH")  # variables that change while a flow runs, but no client


class ObjectMissing(ServiceError):
    """There is no object with that key."""


def open_client(addressing: str | None = None, tries: int = TRIES, timeout: float | None = None) -> Any:
    """Returns a boto3 client for the store of the standard variables; the same client while they do not change.

    Its configuration suits every S3-compatible store: checksums only where requested, since some stores refuse newer
    kinds; the bucket in the path, since a local server has no host name per bucket.

    Args:
        addressing: a style to use instead of CONVOY_S3_ADDRESSING.
        tries: maximum per request.
        timeout: seconds that an answer may take, over at most two tries; None sets limits that suit large files.

    Raises:
        UsageError: the endpoint's address, or another setting, cannot be used.
    """
    # A file with credentials may be renewed, so each call reads it again. Forked processes share no connection.
    renewed = object() if "AWS_ACCESS_KEY_ID" not in os.environ else None
    environment = frozenset(
        (name, os.environ.get(name)) for name in list(os.environ) if not name.startswith(OF_OTHER_LIBRARIES)
    )
    return _client((os.getpid(), renewed, environment), addressing, tries, timeout)


@cache
def _service_descriptions(data_path: str | None) -> Loader:
    """Returns what reads botocore's descriptions of S3, once: that takes six times as long as the rest of a client."""
    return create_loader(data_path)


@lru_cache(maxsize=8)  # creating a client takes as long as a few requests
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
        session = Session()
        session.register_component("data_loader", _service_descriptions(session.get_config_variable("data_path")))
        # botocore itself does not read the variable if AWS_IGNORE_CONFIGURED_ENDPOINT_URLS is set.
        return session.create_client("s3", endpoint_url=settings.s3_url, config=config)
    except (BotoCoreError, ValueError) as error:  # boto3 names the setting, but not its source
        names = [name for name in sorted(os.environ) if name.startswith("AWS_") and "KEY" not in name]
        raise UsageError(
            f"object storage: {one_line(error)}; check {', '.join(names) or 'your AWS profile'}"
        ) from error


def error_code(error: ClientError) -> str:
    """Returns the server's error code, such as `NoSuchKey`; the HTTP status if the answer had no body."""
    return str(error.response.get("Error", {}).get("Code", "unknown"))


@contextmanager
def translated(where: str) -> Iterator[None]:
    """Raises ServiceError, ObjectMissing or UsageError in place of botocore's exceptions.

    Args:
        where: endpoint, bucket and key: the start of each message.
    """
    try:
        yield
    except S3UploadFailedError as error:  # it wraps the server's answer
        if isinstance(error.__context__, ClientError):
            _raise_answer(error.__context__, where)
        raise Outage(f"{where}: the upload failed: {one_line(error)}") from error
    except ClientError as error:
        _raise_answer(error, where)
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise ServiceError(f"{where}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from error
    except ParamValidationError as error:
        reason = one_line(error).partition(": Bucket name must match")[0]  # regular expressions follow
        raise UsageError(f"{where}: invalid name: {reason}") from error
    except EndpointConnectionError as error:
        hint = "start the local servers with `convoy up`, or check AWS_ENDPOINT_URL"
        raise Outage(f"{where}: no connection; {hint}") from error
    except (ConnectionError, HTTPClientError, RetriesExceededError) as error:
        raise Outage(f"{where}: the connection failed after several tries: {one_line(error)}") from error
    except (BotoCoreError, S3DownloadFailedError, S3ValidationError) as error:  # the latter two: it has just changed
        raise ServiceError(f"{where}: {one_line(error)}") from error


def _raise_answer(error: ClientError, where: str) -> NoReturn:
    code = error_code(error)
    if code in {"404", "NoSuchKey"}:
        raise ObjectMissing(f"{where}: no such object") from error
    if code == "NoSuchBucket":
        raise ServiceError(f"{where}: no such bucket; create it, or set CONVOY_BUCKET") from error
    if code in REFUSED:
        raise ServiceError(
            f"{where}: {REFUSED[code]} ({code}); check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "and that they may read and write this bucket"
        ) from error
    message, metadata = error.response.get("Error", {}).get("Message", ""), error.response.get("ResponseMetadata", {})
    tries, status = metadata.get("RetryAttempts", 0) + 1, metadata.get("HTTPStatusCode", 0)
    kind = Outage if status >= 500 or status == 429 else ServiceError
    raise kind(f"{where}: {code} {message} (tries: {tries})".replace("\n", " ")) from error
