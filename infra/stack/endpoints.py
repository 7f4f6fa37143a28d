"""The servers' addresses, and the environment variables that pass them to every client."""

import os
from pathlib import Path

from pydantic import SecretStr

from infra.records import Record
from infra.web_settings import loopback_without_proxy, without_web

TELEMETRY_OFF = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}
REGION = "us-east-1"  # SeaweedFS accepts any region, but signatures need one


class Endpoints(Record):
    """Addresses of the three servers, and the keys of a local object store.

    Attributes:
        home: the state folder.
        bucket: the bucket that holds every byte.
        s3_access_key_id, s3_secret_access_key: None for an external store, for which the user's AWS settings apply.
        prefect_ui_url: the address of Prefect's pages for a browser.
        mlflow_is_local, prefect_is_local: whether the server belongs to the local stack.
    """

    home: Path
    bucket: str
    s3_endpoint_url: str
    s3_access_key_id: SecretStr | None
    s3_secret_access_key: SecretStr | None
    mlflow_tracking_uri: str
    mlflow_is_local: bool
    prefect_api_url: str
    prefect_ui_url: str
    prefect_is_local: bool

    def apply(self) -> None:
        """Makes the clients of this process and of its child processes use these servers.

        Call it before a client library is imported. A local server replaces the user's server of the same kind, so the
        user's variables for that kind (credentials, certificates, regions, timeouts) are removed. If all servers are
        local, proxies and certificates are removed too; fetches from the web still use them (`infra.web_settings`).
        """
        local = {"AWS_": self.s3_is_local, "MLFLOW_": self.mlflow_is_local, "PREFECT_": self.prefect_is_local}
        replaced = tuple(prefix for prefix, is_local in local.items() if is_local)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(replaced)}
        if all(local.values()):
            kept = without_web(kept)
        kept |= self.environment()
        for name in os.environ.keys() - kept.keys():
            del os.environ[name]
        os.environ.update(kept)

    @property
    def s3_is_local(self) -> bool:
        """Whether the object store belongs to the local stack."""
        return self.s3_access_key_id is not None

    def environment(self) -> dict[str, str]:
        """Returns the standard variables that clients read, and those that turn off telemetry and pickle.

        They suffice in a shell that sets no others; `apply` also removes the variables of replaced servers.
        """
        variables = {
            **TELEMETRY_OFF,
            **loopback_without_proxy(),
            "CONVOY_HOME": str(self.home),
            "CONVOY_BUCKET": self.bucket,
            "GIT_PYTHON_REFRESH": "quiet",
            "MLFLOW_TRACKING_URI": self.mlflow_tracking_uri,
            "PREFECT_API_URL": self.prefect_api_url,
            "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
            **self.s3_environment(),
        }
        if self.mlflow_is_local:
            variables["MLFLOW_REGISTRY_URI"] = self.mlflow_tracking_uri
        if self.prefect_is_local:
            variables |= {
                "PREFECT_HOME": str(self.home / "prefect"),
                "PREFECT_PROFILE": "local",
                "PREFECT_UI_URL": self.prefect_ui_url,
            }
        return variables

    def s3_environment(self) -> dict[str, str]:
        """Returns the variables of a local object store; none for an external one, which the user's variables name."""
        if self.s3_access_key_id is None or self.s3_secret_access_key is None:
            return {}
        return {
            "AWS_ENDPOINT_URL": self.s3_endpoint_url,
            "AWS_ACCESS_KEY_ID": self.s3_access_key_id.get_secret_value(),
            "AWS_SECRET_ACCESS_KEY": self.s3_secret_access_key.get_secret_value(),
            "AWS_SESSION_TOKEN": "",
            "AWS_DEFAULT_REGION": REGION,
            # The chosen profile must exist in the files that are read, so profile and files are replaced.
            "AWS_PROFILE": "default",
            "AWS_CONFIG_FILE": str(self.home / "stack" / "aws-config"),
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }
