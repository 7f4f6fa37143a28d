"""Finding and fetching a version of a registered model, by what people write: `name@alias`, `name/version`, `name`."""

import difflib
import os
from pathlib import Path

from mlflow.artifacts import download_artifacts
from mlflow.exceptions import RestException
from mlflow.tracking import MlflowClient

from infra.errors import UsageError
from infra.tracking.client import is_missing, mlflow_client
from infra.tracking.model_registry import ModelVersion, RegisteredVersion, registered
from infra.tracking.names import filter_of

DEFAULT_ALIAS = "champion"  # what a bare name stands for
CONSUMERS_ENVIRONMENT = {
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",  # MLflow refuses a model that it would have to unpickle
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def find_version(reference: str) -> RegisteredVersion:
    """The version that `name`, `name@alias` or `name/version` means; a bare name is that name's champion.

    Raises:
        UsageError: there is no such model, alias or version; the message names those that there are.
        ServiceError: MLflow failed.
    """
    plain = reference.removeprefix("models:/")
    name, _, number = plain.partition("/")
    alias = ""
    if not number:
        name, _, alias = plain.partition("@")
        alias = alias or DEFAULT_ALIAS
    if not name:
        raise UsageError(f"{reference!r} names no model; write NAME, NAME@ALIAS or NAME/VERSION")
    with mlflow_client(f"look for model {name!r}") as client:
        if number and (found := _version(client, name, number)):
            return found
        try:
            aliases: dict[str, str] = client.get_registered_model(name).aliases
        except RestException as error:
            if not is_missing(error):
                raise
            names = [model.name for model in client.search_registered_models(max_results=100)]
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names) or 'none yet'}"
            raise UsageError(f"no model is called {name!r}; {hint}") from None
        if alias:
            number = str(aliases.get(alias, ""))
        if alias and not number:
            known = ", ".join(f"{name}@{each}" for each in sorted(aliases)) or "it has none yet"
            raise UsageError(
                f"model {name!r} has no alias {alias!r}; aliases: {known}; a version is named like {name}/1"
            )
        if alias and (found := _version(client, name, number)):
            return found
        versions = sorted(int(version.version) for version in client.search_model_versions(filter_of(name=name)))
        known = f"{versions[0]} to {versions[-1]}" if versions else "none"
        raise UsageError(f"model {name!r} has no version {number!r}; versions: {known}")


def _version(client: MlflowClient, name: str, number: str) -> RegisteredVersion | None:
    try:
        return registered(client.get_model_version(name, number))
    except RestException as error:
        if not is_missing(error):
            raise
        return None


def list_versions(name: str) -> list[RegisteredVersion]:
    """All versions of a model, the newest first; empty if there is no such model."""
    with mlflow_client(f"list the versions of model {name!r}") as client:
        found = client.search_model_versions(filter_of(name=name), order_by=["version_number DESC"])
    return list(map(registered, found))


def download_version(version: ModelVersion, folder: Path) -> Path:
    """Fetch a version's files into an existing folder; returns what `mlflow.pyfunc.load_model` takes."""
    os.environ.update(CONSUMERS_ENVIRONMENT)
    with mlflow_client(f"fetch {version.uri}"):
        return Path(download_artifacts(version.uri, dst_path=str(folder)))
