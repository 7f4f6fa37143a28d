"""Connects to the MLflow server of `MLFLOW_TRACKING_URI`: its address, a check that it answers, and a client."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import urlencode

import mlflow
import requests
from mlflow.exceptions import MlflowException, RestException
from mlflow.store.entities import PagedList
from mlflow.utils.credentials import get_default_host_creds

from infra.errors import Outage, ServiceError, without_login
from infra.web_settings import check_web_environment

HEALTH_TIMEOUT_SECONDS = 5.0
CLIENT_DEFAULTS = {
    # Waits about 35 s in all for a server that restarts; MLflow's default is four minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "5",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    # The summary prints the addresses; between progress bars they disturb.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # Convoy shows its own
}

T = TypeVar("T")


@contextmanager
def mlflow_client(action: str) -> Iterator[mlflow.MlflowClient]:
    """Yields a client; raises a one-line ServiceError in place of MLflow's errors inside the block.

    Args:
        action: the block's work, for the message: "log the evaluation report".
    """
    for name, value in CLIENT_DEFAULTS.items():
        os.environ.setdefault(name, value)
    try:
        yield mlflow.MlflowClient()
    except (MlflowException, requests.RequestException) as error:
        status = http_status(error)
        if status in (401, 403):
            raise ServiceError(
                f"MLflow at {tracking_uri()} does not let you {action}: check MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, and that user's permissions"
            ) from error
        # MLflow's client reports every download that failed as missing, even in an outage.
        hidden = getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST"
        is_final = isinstance(error, RestException) or (is_refusal(status) and not hidden)
        what, kind = ("refused", ServiceError) if is_final else ("failed", Outage)
        raise kind(f"MLflow at {tracking_uri()} {what} to {action}: {first_line(error)}") from error


def http_status(error: Exception) -> int:
    """Returns the HTTP status of MLflow's answer, or the one that fits an error of its client; 500 without an answer.

    Requests for artifacts raise the exceptions of the library requests.
    """
    if isinstance(error, MlflowException):
        return int(error.get_http_status_code())  # type: ignore[no-untyped-call]
    return int(getattr(getattr(error, "response", None), "status_code", 500))


def is_refusal(status: int) -> bool:
    """Returns whether a request with this answer cannot succeed later either, since it is wrong itself."""
    return 400 <= status < 500 and status not in (401, 403, 408, 429)  # a token or limit may change


def none_if_missing(query: Callable[..., T], *arguments: str) -> T | None:
    """Returns the answer of a client's method; None if MLflow has no such run, model, version or alias."""
    try:
        return query(*arguments)
    except RestException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # or a malformed id
            raise
        return None


def all_pages(search: Callable[..., PagedList[T]], *, limit: int | None = None, **options: Any) -> list[T]:
    """Returns the results on all pages of a client's search, or on the pages up to `limit` results."""
    page = search(**options)
    found = list(page)
    while page.token and (limit is None or len(found) < limit):
        page = search(page_token=page.token, **options)
        found += page
    return found


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, at most 300 characters: MLflow's messages may fill pages.

    Users and passwords in addresses are removed.
    """
    return without_login(str(error).strip().partition("\n")[0])[:300]


def tracking_uri() -> str:
    """Returns the tracking server's address without user and password."""
    return without_login(mlflow.get_tracking_uri()).rstrip("/")


def page_url(page: str, **options: str) -> str:
    """Returns the address of a page of MLflow, in its view for model training.

    Without this option, MLflow shows its view for language models, which hides models, parameters and metrics.

    Args:
        page: path of the page, such as `models/digits`.
    """
    return f"{tracking_uri()}/#/{page}?{urlencode({'workflowType': 'machine_learning', **options})}"


def check_server() -> None:
    """Checks that the tracking server answers, without MLflow's long retries.

    Raises:
        UsageError: a variable for proxies or certificates has an invalid value.
        ServiceError: no answer within a few seconds, or only from a proxy in front of it.
    """
    check_web_environment()
    address = mlflow.get_tracking_uri().rstrip("/")
    if not address.startswith(("http://", "https://")):  # a database
        return
    tls = get_default_host_creds(address)  # type: ignore[no-untyped-call]
    try:  # by MLflow's own library, which reads variables for proxies and certificates that others do not
        status = requests.get(
            f"{address}/health", timeout=HEALTH_TIMEOUT_SECONDS, verify=tls.verify, cert=tls.client_cert_path
        ).status_code
    except OSError as error:  # any error of requests, or a missing file of certificates
        reason = getattr(error.args[0] if error.args else None, "reason", None) or error
        hint = "start it with `convoy up`, or correct MLFLOW_TRACKING_URI"
        raise Outage(f"MLflow at {tracking_uri()} does not answer ({first_line(reason)}); {hint}") from error
    if status in (502, 503, 504):
        raise Outage(f"MLflow at {tracking_uri()} is not available (HTTP {status}); try again later")
