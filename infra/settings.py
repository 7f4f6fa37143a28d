"""Where Convoy keeps its state and which servers it uses, read from environment variables only.

Importing this module loads pydantic only, so that `convoy --help` stays quick.
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


Address = Annotated[str, AfterValidator(_http_address)]
Port = Annotated[int, Field(ge=1024, le=65535)]


class Settings(BaseSettings):
    """The environment's answers. Each field names its variable; unset means the default.

    Raises:
        UsageError: a variable has a value that cannot be used; the message names the variable.
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

    bucket: str = Field("convoy", pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")
    """CONVOY_BUCKET: the bucket that holds every byte."""

    mirror: str | None = None
    """CONVOY_MIRROR: a folder or an address that is asked for data set files before the official mirrors."""

    address: str | None = None
    """CONVOY_ADDRESS: where other nodes reach this one. Unset: the address that it reaches the storage from."""

    slots: int | None = Field(None, ge=1)
    """CONVOY_SLOTS: ranks that this machine runs, as one node of several. Unset: one a GPU, or one a core."""

    cache_bytes: ByteSize | None = Field(None, ge=1)
    """CONVOY_CACHE_BYTES: what the cache may hold, for example 200GB; what was not used for longest leaves when more
    is needed. Unset: nine tenths of what the disk has free, beside what is there."""

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
    """CONVOY_S3_ADDRESSING: where the bucket's name goes: into the path of an address, which nearly every store takes,
    or into the host name (virtual); auto leaves it to boto3."""

    mlflow_uri: str | None = Field(None, validation_alias="MLFLOW_TRACKING_URI")
    """MLFLOW_TRACKING_URI: an MLflow to use instead of a local one; any form that MLflow understands."""

    prefect_api_url: Address | None = Field(None, validation_alias="PREFECT_API_URL")
    """PREFECT_API_URL: a Prefect API to use instead of a local one."""

    prefect_ui_url: Address | None = Field(None, validation_alias="PREFECT_UI_URL")
    """PREFECT_UI_URL: where people open that Prefect. Unset: the API's address without its `/api`."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UsageError(_complaints(error)) from None

    @property
    def cache(self) -> Path:
        """Folder of the content-addressed cache."""
        return self.home / "cache"

    @property
    def logs(self) -> Path:
        """Folder of the servers' logs."""
        return self.home / "logs"

    @property
    def runs(self) -> Path:
        """Folder of what running trainings keep on disk."""
        return self.home / "runs"


def _complaints(error: ValidationError) -> str:
    """Name each variable that is wrong, and why; an address is not repeated, since it may hold a password."""
    complaints = []
    for detail in error.errors(include_url=False):
        name = str(detail["loc"][0])
        variable = f"CONVOY_{name.upper()}" if name in Settings.model_fields else name
        complaints.append(f"{variable}: {detail['msg'].removeprefix('Value error, ')}")
    return "; ".join(complaints)
