"""The MLflow server of `MLFLOW_TRACKING_URI`: its address, whether it answers, and a client for it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import mlflow
from mlflow.exceptions import MlflowException, RestException
from requests import RequestException

from infra.errors import Outage, ServiceError, without_login
from infra.web_settings import check_web_environment

ANSWER_WITHIN = 5.0  # seconds a server has to answer the first request of a run
CLIENT_DEFAULTS = {
    # A server that restarts is waited for, about 35 s in all; MLflow's own default is four minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "5",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    # Our own summary prints the addresses; between progress bars they only disturb.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # what takes long has ours
}
NOT_LET_IN = ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "PERMISSION_DENIED")  # what MLflow calls 401 and 403


@contextmanager
def mlflow_client(action: str) -> Iterator[mlflow.MlflowClient]:
    """Yield a client; a failure inside the block becomes a ServiceError in one line.

    Args:
        action: what the block does, for the message: "log the evaluation report".
    """
    for name, value in CLIENT_DEFAULTS.items():
        os.environ.setdefault(name, value)
    try:
        yield mlflow.MlflowClient()
    except (MlflowException, RequestException) as error:
        if getattr(error, "error_code", None) in NOT_LET_IN:
            raise ServiceError(
                f"MLflow at {tracking_uri()} does not let you {action}: check MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, and what that user may do"
            ) from error
        refused = isinstance(error, RestException)
        what, kind = ("refused", ServiceError) if refused else ("failed", Outage)
        raise kind(f"MLflow at {tracking_uri()} {what} to {action}: {first_line(error)}") from error


def is_missing(error: RestException) -> bool:
    """Whether MLflow says that there is no such thing; of a malformed id or number it says that with another code."""
    return error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


def first_line(error: Exception) -> str:
    """The beginning of an error's message: MLflow's own go on for pages."""
    return str(error).strip().partition("\n")[0][:300]


def tracking_uri() -> str:
    """The address of the tracking server, without the name and password that it may hold: fit to be shown."""
    return without_login(mlflow.get_tracking_uri()).rstrip("/")


def check_server() -> None:
    """Asks the tracking server for a sign of life, without MLflow's long retries.

    Raises:
        UsageError: a variable about proxies or certificates cannot be used.
        ServiceError: no answer within a few seconds, or only from a proxy before it.
    """
    check_web_environment()
    address = mlflow.get_tracking_uri().rstrip("/")
    if not address.startswith(("http://", "https://")):
        return
    try:
        status = httpx.get(f"{address}/health", timeout=ANSWER_WITHIN).status_code
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Outage(
            f"MLflow at {tracking_uri()} does not answer ({error}); "
            "start it with `convoy up`, or correct MLFLOW_TRACKING_URI"
        ) from error
    if status in (502, 503, 504):
        raise Outage(f"MLflow at {tracking_uri()} is not available (HTTP {status}); try again when it is up")
