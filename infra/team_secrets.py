"""Creates the passwords of the team's services, once: `make team-secrets`. Uses only the standard library.

Compose reads `infra/.env` itself; `infra/.client.env` has the standard variables for clients on this machine:

    set -a; . infra/.client.env; set +a; convoy train

Only the owner can read the files. Only their names are printed.
"""

import os
import secrets
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
SERVICES, CLIENT = ".env", ".client.env"


def make(folder: Path = FOLDER) -> list[Path]:
    """Writes both files into a folder and returns their paths.

    Raises:
        FileExistsError: a file exists already, and servers may use its passwords.
    """
    random = {
        name: secrets.token_hex(24)  # characters without a meaning in a shell, in YAML or in an address
        for name in (
            *("POSTGRES_PASSWORD", "MLFLOW_DB_PASSWORD", "PREFECT_DB_PASSWORD"),
            *("MLFLOW_ADMIN_PASSWORD", "MLFLOW_SECRET_KEY", "S3_SECRET_ACCESS_KEY"),
        )
    }
    services = random | {
        "S3_ACCESS_KEY_ID": "CONVOY" + secrets.token_hex(7).upper(),
        "PREFECT_AUTH_STRING": f"convoy:{secrets.token_hex(24)}",
    }
    client = {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:8333",
        "AWS_ACCESS_KEY_ID": services["S3_ACCESS_KEY_ID"],
        "AWS_SECRET_ACCESS_KEY": services["S3_SECRET_ACCESS_KEY"],
        "AWS_DEFAULT_REGION": "us-east-1",
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:5000",
        "MLFLOW_TRACKING_USERNAME": "admin",
        "MLFLOW_TRACKING_PASSWORD": services["MLFLOW_ADMIN_PASSWORD"],
        "PREFECT_API_URL": "http://127.0.0.1:4200/api",
        "PREFECT_API_AUTH_STRING": services["PREFECT_AUTH_STRING"],
    }
    files = {folder / SERVICES: services, folder / CLIENT: client}
    if existing := [path for path in files if path.exists()]:
        raise FileExistsError(f"{existing[0]} exists already: delete it only together with the services' volumes")
    for path, variables in files.items():
        lines = "".join(f"{name}={value}\n" for name, value in sorted(variables.items()))
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(lines)
    return list(files)


def main() -> int:
    """Returns the exit status: 2 if there are secrets already."""
    try:
        for path in make():
            print(f"wrote {path}")
    except FileExistsError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
