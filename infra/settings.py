"""Reads from environment variables where Convoy keeps its state and which servers it uses.

This module imports only pydantic, so that `convoy --help` stays fast.
"""

from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, AliasChoices, ByteSize, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from infra.errors import UsageError

DEFAULT_HOME = ".convoy"


def _absolute(path: Path) -> Path:
    try:
        return path.expanduser().absolute()
    except RuntimeError:
        raise ValueError(f"there is no home folder of {path.parts[0]}") from None


def _http_address(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("it must start with http:// or https:// and name a host")
    try:
        _ = parts.port
    except ValueError:
        raise ValueError("its port must be a number up to 65535") from None
    return url.rstrip("/")


def _tracking_address(url: str) -> str:
    is_other = url == "databricks" or ("://" in url and not url.lower().startswith("http"))
    return url if is_other else _http_address(url)


Address = Annotated[str, AfterValidator(_http_address)]
Port = Annotated[int, Field(ge=1024, le=65535)]


class Settings(BaseSettings):
    """The settings of the environment. Each field names its variable; unset means the default.

    Raises:
        UsageError: a variable has an invalid value; the message names the variable.
    """

    model_config = SettingsConfigDict(
        env_prefix="CONVOY_",
        env_ignore_empty=True,
        frozen=True,
        extra="ignore",
        validate_default=True,
        populate_by_name=True,
        use_attribute_docstrings=True,
    )

    home: Annotated[Path, AfterValidator(_absolute)] = Path(DEFAULT_HOME)
    """CONVOY_HOME: the state folder (data, logs, credentials, cache), relative to the working folder."""

    project: Annotated[Path, AfterValidator(_absolute)] | None = None
    """CONVOY_PROJECT: the working folder of a worker's flow runs, for relative paths and networks of your own. Unset:
    that of `convoy worker`; of Prefect's own worker, a temporary folder."""

    bucket: str = Field("convoy", pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")
    """CONVOY_BUCKET: the bucket that holds all data."""

    mirror: str | None = None
    """CONVOY_MIRROR: a folder or an address to try for data sets and published weights before the official mirrors."""

    address: str | None = None
    """CONVOY_ADDRESS: where other nodes reach this one. Unset: the local address of its connection to the storage."""

    slots: int | None = Field(None, ge=1)
    """CONVOY_SLOTS: ranks that this machine runs, as one node of several. Unset: one per GPU, or one per core."""

    cache_bytes: ByteSize | None = Field(None, ge=1)
    """CONVOY_CACHE_BYTES: the cache's limit, for example 200GB; the least recently used files are removed when more is
    needed. Unset: the cache's present size plus nine tenths of the disk's free space."""

    sweep_seconds: float = Field(60.0, gt=0)
    """CONVOY_SWEEP_SECONDS: seconds between a worker's looks at trainings that died."""

    pod: str | None = Field(None, pattern=r"^[^/]+/[^/]+/[^/]+$")
    """CONVOY_POD: namespace/name/uid of the Kubernetes pod that the flow runs in; its training's Job ends with it."""

    s3_port: Port | None = None
    """CONVOY_S3_PORT: port of the object store. Unset: the last one used, or 8333, or a free one."""

    mlflow_port: Port | None = None
    """CONVOY_MLFLOW_PORT: port of the local MLflow. Unset: the last one used, or 5000, or a free one."""

    prefect_port: Port | None = None
    """CONVOY_PREFECT_PORT: port of the local Prefect. Unset: the last one used, or 4200, or a free one."""

    s3_url: Address | None = Field(None, validation_alias=AliasChoices("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"))
    """AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL: an object store to use instead of a local one."""

    s3_addressing: Literal["path", "virtual", "auto"] = "path"
    """CONVOY_S3_ADDRESSING: where an address has the bucket's name: in the path, which nearly every store accepts, or
    in the host name (virtual); auto leaves it to boto3."""

    mlflow_uri: Annotated[str, AfterValidator(_tracking_address)] | None = Field(
        None, validation_alias="MLFLOW_TRACKING_URI"
    )
    """MLFLOW_TRACKING_URI: an MLflow to use instead of a local one: a server, or on one machine a database, such as
    sqlite:////data/mlflow.db."""

    prefect_api_url: Address | None = Field(None, validation_alias="PREFECT_API_URL")
    """PREFECT_API_URL: a Prefect API to use instead of a local one."""

    prefect_ui_url: Address | None = Field(None, validation_alias="PREFECT_UI_URL")
    """PREFECT_UI_URL: that Prefect's address in a browser. Unset: the API's address without its `/api`."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UsageError(_complaints(error)) from None

    @property
    def cache(self) -> Path:
        """Returns the folder of the content-addressed cache."""
        return self.home / "cache"

    @property
    def logs(self) -> Path:
        """Returns the folder of the servers' logs."""
        return self.home / "logs"

    @property
    def runs(self) -> Path:
        """Returns the folder of the files of running trainings."""
        return self.home / "runs"


def _complaints(error: ValidationError) -> str:
    """Returns which variables are wrong and why, without their values, since an address may contain a password."""
    complaints = []
    for detail in error.errors(include_url=False):
        name = str(detail["loc"][0])
        variable = f"CONVOY_{name.upper()}" if name in Settings.model_fields else name
        complaints.append(f"{variable}: {detail['msg'].removeprefix('Value error, ')}")
    return "; ".join(complaints)
