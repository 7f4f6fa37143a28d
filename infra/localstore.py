"""The local object store's last steps to being ready: its bucket exists, and what is written can be read."""

import os
import time
import uuid
from contextlib import suppress
from typing import Any

from infra import stopping
from infra.credentials import Credentials
from infra.endpoints import REGION
from infra.errors import ServiceError

POLL = 0.1  # seconds between tries


def make_ready(url: str, credentials: Credentials, bucket: str, *, just_started: bool, patience: float) -> None:
    """Make the bucket if need be; after a start, write, read and delete an object.

    The port answers some seconds before the store's parts have found each other, and until then it can answer
    every read with an internal error.

    Args:
        patience: seconds to go on trying.

    Raises:
        ServiceError: the store refused, or went on failing.
    """
    from botocore.exceptions import BotoCoreError, ClientError  # slow to import

    client = _open_client(url, credentials)
    deadline = time.monotonic() + patience
    while True:
        try:
            with suppress(client.exceptions.BucketAlreadyOwnedByYou):
                client.create_bucket(Bucket=bucket)
            if just_started:
                _round_trip(client, bucket)
            return
        except (BotoCoreError, ClientError) as error:
            if time.monotonic() > deadline:
                raise ServiceError(f"bucket {bucket} at {url} cannot be used: {error}") from None
        stopping.sleep(POLL)


def _open_client(url: str, credentials: Credentials) -> Any:
    """An S3 client that reads nothing that the user has set up for another store."""
    from botocore.config import Config
    from botocore.session import Session

    not_the_users_own = {"profile": (None, None, None, None), "config_file": (None, None, os.devnull, None)}
    return Session(session_vars=not_the_users_own).create_client(
        "s3",
        endpoint_url=url,
        region_name=REGION,
        aws_access_key_id=credentials.access_key_id.get_secret_value(),
        aws_secret_access_key=credentials.secret_access_key.get_secret_value(),
        config=Config(retries={"mode": "standard", "total_max_attempts": 1}, proxies={}),
    )


def _round_trip(client: Any, bucket: str) -> None:
    key = f"readiness/{uuid.uuid4().hex}"
    client.put_object(Bucket=bucket, Key=key, Body=b"ready")
    try:
        client.get_object(Bucket=bucket, Key=key)["Body"].read()
    finally:
        client.delete_object(Bucket=bucket, Key=key)
