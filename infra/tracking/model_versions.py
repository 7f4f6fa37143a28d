"""Resolves `name`, `name@alias` or `name/version` to a registered version, and downloads its files."""

import difflib
import os
from pathlib import Path

from mlflow.artifacts import download_artifacts

from infra.errors import UsageError
from infra.tracking.client import mlflow_client, none_if_missing
from infra.tracking.model_registry import ModelVersion, RegisteredVersion, registered, search_versions

DEFAULT_ALIAS = "champion"
LOADING_ENVIRONMENT = {
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",  # MLflow then refuses a model that it would have to unpickle
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def find_version(reference: str) -> RegisteredVersion:
    """Returns the version of a reference `name` (its champion), `name@alias` or `name/version`.

    Raises:
        UsageError: there is no such model, alias or version; the message names the existing ones.
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
    with mlflow_client(f"find model {name!r}") as client:
        if number and (found := none_if_missing(client.get_model_version, name, number)):
            return registered(found)
        model = none_if_missing(client.get_registered_model, name)
        if model is None:
            names = [model.name for model in client.search_registered_models(max_results=100)]
            near = difflib.get_close_matches(name, names, n=1)
            known = f"there are: {', '.join(names)}" if names else "there is none yet"
            hint = f"did you mean {near[0]!r}?" if near else known
            raise UsageError(f"no model is called {name!r}; {hint}")
        if alias:
            number = str(model.aliases.get(alias, ""))
            if not number:
                known = ", ".join(f"{name}@{each}" for each in sorted(model.aliases)) or "it has none yet"
                hint = f"aliases: {known}; a version is named like {name}/1"
                if alias == DEFAULT_ALIAS:
                    hint = f"no version of it was promoted yet; {hint}"
                raise UsageError(f"model {name!r} has no alias {alias!r}; {hint}")
            if found := none_if_missing(client.get_model_version, name, number):
                return registered(found)
    versions = [version.version for version in search_versions(name=name)]
    known = f"{versions[-1]} to {versions[0]}" if versions else "none"
    raise UsageError(f"model {name!r} has no version {number!r}; versions: {known}")


def download_version(version: ModelVersion, folder: Path) -> Path:
    """Downloads a version's files into an existing folder; returns the path for `mlflow.pyfunc.load_model`."""
    os.environ.update(LOADING_ENVIRONMENT)
    with mlflow_client(f"fetch {version.uri}"):
        return Path(download_artifacts(version.uri, dst_path=str(folder)))
