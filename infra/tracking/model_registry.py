"""MLflow's model registry: what is served, under which name, version and alias."""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any
from urllib.parse import quote

import numpy as np
from mlflow.entities import LoggedModelOutput
from mlflow.exceptions import MlflowException, RestException
from mlflow.models import Model, infer_signature
from numpy.typing import NDArray
from rich.filesize import decimal

from infra.errors import ServiceError, UsageError
from infra.records import Record
from infra.tracking.client import is_missing, mlflow_client, tracking_uri
from infra.tracking.names import filter_of, model_name_fault
from infra.tracking.tags import VersionRecord

ARTIFACT = "model"  # the served model's name among the run's models
DESCRIPTION_CHARACTERS = 5000  # MLflow's limit
MODELS_A_CALL = 100
SPARE = 16 << 20  # bytes beside its weights that storing a model takes


class ModelVersion(Record):
    """A version of a registered model."""

    name: str
    version: str

    @property
    def address(self) -> str:
        """`name/version`, as people write it."""
        return f"{self.name}/{self.version}"

    @property
    def uri(self) -> str:
        """What MLflow loads: `models:/name/version`."""
        return f"models:/{self.name}/{self.version}"

    @property
    def url(self) -> str:
        """Its address in MLflow's web pages."""
        return f"{tracking_uri()}/#/models/{quote(self.name, safe='')}/versions/{self.version}"


class RegisteredVersion(ModelVersion):
    """A version with what the registry says of it."""

    run_id: str
    tags: dict[str, str]
    aliases: tuple[str, ...] = ()
    """That point at it, if they were asked for (`every_version`)."""

    @property
    def record(self) -> VersionRecord:
        """What its tags say."""
        return VersionRecord.from_tags(self.tags)

    def required(self, field: str) -> str:
        """Returns a field of its record.

        Raises:
            UsageError: it has no such tag.
        """
        value: str | None = getattr(self.record, field)
        if value is None:
            raise UsageError(f"{self.uri} has no tag convoy.{field}: it was not registered by Convoy")
        return value


def registered(version: Any, aliases: Iterable[str] = ()) -> RegisteredVersion:
    """Returns MLflow's model version as ours."""
    return RegisteredVersion(
        name=version.name,
        version=str(version.version),
        run_id=version.run_id or "",
        tags=version.tags,
        aliases=tuple(aliases),
    )


def check_model_name(name: str) -> str:
    """Returns the name if MLflow takes it.

    Raises:
        UsageError: it could not be registered, or not be found again.
    """
    if fault := model_name_fault(name):
        raise UsageError(f"{name!r} cannot name a model: {fault}; choose one with --name")
    return name


@contextmanager
def rehearsal(folder: Path) -> Iterator[None]:
    """Stores a tiny model while the block waits for something else.

    MLflow and torch.export take seconds to load what `log_model` needs. The block waits for it at its end, since no
    other thread may use a network while torch.export works.

    Args:
        folder: an existing one, for a temporary folder in it.
    """

    def store() -> None:
        import torch

        model, images = torch.nn.Identity().eval(), np.zeros((2, 1), dtype=np.float32)
        with suppress(Exception), TemporaryDirectory(dir=folder) as temporary:  # what is wrong, `log_model` will say
            _check_room(Path(temporary), model)
            _save(model, Path(temporary, ARTIFACT), images, images, ["torch"])

    thread = Thread(target=store, name="rehearsal", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()  # torch ends the program badly where it is at work while the interpreter ends


def log_model(
    run_id: str,
    model: Any,
    *,
    images: NDArray[Any],
    outputs: NDArray[Any],
    requirements: Sequence[str],
    metadata: Mapping[str, Any],
) -> str:
    """Store a model with a run, as a torch.export program; returns its id in MLflow. Nothing is registered.

    This is `mlflow.pytorch.log_model` in its parts, for three reasons: it can pin the device (a program
    exported on the CPU only runs there, yet MLflow would move it to any GPU it finds, and fail), it uses no
    global run, and it prints nothing. The requirements are given, so that MLflow need not load the model to
    find them out.

    Args:
        model: the torch.nn.Module, in evaluation mode on the CPU.
        images: an example input; at least two images, since the export takes a batch of one for a constant.
        outputs: what the model gives for it; both together are the signature, with any number of images.
        requirements: pinned packages that loading and calling the model take.
        metadata: JSON values that travel with the model, for example the names of the classes.

    Raises:
        ServiceError: there is no room for it in the temporary folder, or MLflow failed.
    """
    assert len(images) >= 2
    with mlflow_client(f"store the model of run {run_id}") as client, TemporaryDirectory() as temporary:
        _check_room(Path(temporary), model)
        run = client.get_run(run_id)
        logged = client.create_logged_model(
            run.info.experiment_id, name=ARTIFACT, source_run_id=run_id, params=run.data.params
        )
        try:
            folder = Path(temporary) / ARTIFACT
            card = Model(artifact_path=logged.artifact_location, run_id=run_id, model_id=logged.model_id)
            _save(model, folder, images, outputs, requirements, mlflow_model=card, metadata=dict(metadata))
            saved = Model.load(folder)
            saved.flavors["python_function"]["config"]["device"] = "cpu"
            saved.save(folder / "MLmodel")
            client.log_model_artifacts(logged.model_id, str(folder))
            client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
        except BaseException:
            with suppress(MlflowException):  # what went wrong first is what should be known
                client.finalize_logged_model(logged.model_id, "FAILED")
            raise
        client.finalize_logged_model(logged.model_id, "READY")
    return str(logged.model_id)


def _check_room(folder: Path, model: Any) -> None:
    """Raises ServiceError if a folder's disk has no room for a model: torch's writer would end the process there."""
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    if shutil.disk_usage(folder).free < 2 * size + SPARE:
        raise ServiceError(
            f"no space left on the disk for {folder}: the model takes {decimal(size)} there for a while; free some "
            "(`convoy prune` may help) and try again"
        )


def _save(
    model: Any, folder: Path, images: NDArray[Any], outputs: NDArray[Any], requirements: Sequence[str], **more: Any
) -> None:
    import mlflow.pytorch  # only here: it loads torch, which reading the registry does not need

    mlflow.pytorch.save_model(
        model,
        folder,
        signature=infer_signature(images, outputs),
        input_example=images,
        pip_requirements=list(requirements),
        serialization_format="pt2",
        **more,
    )


def create_version(name: str, model_id: str, *, run_id: str, tags: Mapping[str, str]) -> ModelVersion:
    """Register a stored model as the next version of `name`, without an alias.

    Raises:
        UsageError: not a name for a model.
    """
    check_model_name(name)
    with mlflow_client(f"register a version of model {name!r}") as client:
        try:
            client.create_registered_model(name)
        except RestException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        created = client.create_model_version(
            name, f"models:/{model_id}", run_id=run_id, tags=dict(tags), model_id=model_id
        )
    return ModelVersion(name=name, version=str(created.version))


def check_model_exists(name: str) -> None:
    """Raises UsageError if nothing was ever registered under this name."""
    with mlflow_client(f"look for model {name!r}") as client:
        try:
            client.get_registered_model(name)
        except RestException as error:
            if not is_missing(error):
                raise
            raise UsageError(f"no model is called {name!r}; MLflow lists them at {tracking_uri()}/#/models") from None


def version_of(name: str, run_id: str) -> ModelVersion | None:
    """The newest version of `name` that a run has registered; None if there is none."""
    with mlflow_client(f"look for versions of model {name!r}") as client:
        found = client.search_model_versions(filter_of(name=name, run_id=run_id))
    versions = sorted((int(version.version) for version in found), reverse=True)
    return ModelVersion(name=name, version=str(versions[0])) if versions else None


def every_version() -> list[RegisteredVersion]:
    """All versions of all models."""
    found: list[RegisteredVersion] = []
    with mlflow_client("list the registered models") as client:
        aliases: dict[tuple[str, str], list[str]] = {}
        token: str | None = None
        while True:
            models = client.search_registered_models(max_results=MODELS_A_CALL, page_token=token)
            for model in models:
                for alias, version in model.aliases.items():
                    aliases.setdefault((model.name, str(version)), []).append(alias)
            token = models.token
            if not token:
                break
        while True:
            versions = client.search_model_versions(max_results=MODELS_A_CALL, page_token=token)
            for version in versions:
                found.append(registered(version, aliases.get((version.name, str(version.version)), ())))
            token = versions.token
            if not token:
                return found


def set_alias(model: ModelVersion, alias: str) -> None:
    """Point an alias of the model's name at this version, away from any other."""
    with mlflow_client(f"set alias {alias} of model {model.name!r}") as client:
        client.set_registered_model_alias(model.name, alias, model.version)


def aliased(name: str, alias: str) -> ModelVersion | None:
    """The version that an alias points at; None if there is no such model or alias."""
    with mlflow_client(f"read alias {alias} of model {name!r}") as client:
        try:
            found = client.get_model_version_by_alias(name, alias)
        except RestException as error:
            if is_missing(error):
                return None
            raise
    return ModelVersion(name=name, version=str(found.version))


def delete_alias(name: str, alias: str) -> None:
    """Take an alias from a model; nothing happens if it has none of that name."""
    with mlflow_client(f"delete alias {alias} of model {name!r}") as client:
        client.delete_registered_model_alias(name, alias)


def describe_version(model: ModelVersion, markdown: str) -> None:
    """Set a version's description, as its page shows it; what is beyond MLflow's limit is cut off, and said to be."""
    if len(markdown) > DESCRIPTION_CHARACTERS:
        markdown = markdown[: DESCRIPTION_CHARACTERS - 2] + " …"
    with mlflow_client(f"describe version {model.version} of model {model.name!r}") as client:
        client.update_model_version(model.name, model.version, markdown)


def tag_version(model: ModelVersion, tags: Mapping[str, str]) -> None:
    """Set tags of a version."""
    with mlflow_client(f"tag version {model.version} of model {model.name!r}") as client:
        for name, value in tags.items():
            client.set_model_version_tag(model.name, model.version, name, value)
