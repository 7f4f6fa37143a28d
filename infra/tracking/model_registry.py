"""Stores models in MLflow, and registers, lists, tags and describes their versions and aliases."""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
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
from infra.tracking.client import all_pages, mlflow_client, none_if_missing, page_url
from infra.tracking.names import filter_of, model_name_fault
from infra.tracking.tags import TEMPERATURE, VersionRecord

ARTIFACT = "model"  # the served model's name among the run's models
DESCRIPTION_CHARACTERS = 5000  # MLflow's limit
EXTRA_MODEL_BYTES = 16 << 20  # disk space that storing a model takes in addition to its weights


class ModelVersion(Record):
    """A version of a registered model."""

    name: str
    version: str

    @property
    def address(self) -> str:
        """Returns `name/version`."""
        return f"{self.name}/{self.version}"

    @property
    def uri(self) -> str:
        """Returns `models:/name/version`, from which MLflow loads the version."""
        return f"models:/{self.address}"

    @property
    def url(self) -> str:
        """Returns the address of the version's page in MLflow."""
        return page_url(f"models/{quote(self.name, safe='')}/versions/{self.version}")


class RegisteredVersion(ModelVersion):
    """A version with its run and tags in the registry."""

    run_id: str
    created: datetime
    description: str
    tags: dict[str, str]

    @property
    def record(self) -> VersionRecord:
        """Returns its tags as a typed record."""
        return VersionRecord.from_tags(self.tags)

    def required(self, field: str) -> str:
        """Returns a field of its record.

        Raises:
            UsageError: the version has no such tag.
        """
        value: str | None = getattr(self.record, field)
        if value is None:
            raise UsageError(f"{self.uri} has no tag convoy.{field}: it was not registered by Convoy")
        return value

    @property
    def temperature(self) -> float:
        """Returns the divisor of its logits that calibrates its probabilities; 1 without a tag.

        Raises:
            UsageError: the tag is not a positive number.
        """
        tag = self.record.temperature or "1"
        try:
            temperature = float(tag)
        except ValueError:
            temperature = 0.0
        if not 0 < temperature < float("inf"):
            raise UsageError(f"{self.uri}: its tag {TEMPERATURE} is {tag!r}, not a positive number")
        return temperature


def registered(version: Any) -> RegisteredVersion:
    """Converts MLflow's model version."""
    return RegisteredVersion(
        name=version.name,
        version=str(version.version),
        run_id=version.run_id or "",
        created=datetime.fromtimestamp(version.creation_timestamp / 1000, tz=UTC),
        description=version.description or "",
        tags=version.tags,
    )


def check_model_name(name: str) -> str:
    """Returns the name if MLflow accepts it.

    Raises:
        UsageError: a model of this name could not be registered, or not be found again.
    """
    if fault := model_name_fault(name):
        raise UsageError(f"{name!r} cannot name a model: {fault}")
    return name


@contextmanager
def rehearsal(folder: Path) -> Iterator[None]:
    """Saves a tiny model in a thread during the block, so that `log_model` is fast afterwards.

    MLflow and torch.export take seconds to import what `log_model` needs. The block's end waits for the thread, since
    no other thread may use a network while torch.export works.

    Args:
        folder: an existing folder, for temporary files.
    """

    def store() -> None:
        import torch

        model, images = torch.nn.Identity().eval(), np.zeros((2, 1), dtype=np.float32)
        with suppress(Exception), TemporaryDirectory(dir=folder) as temporary:  # `log_model` will report the error
            _check_disk_space(Path(temporary), model)
            _save(model, Path(temporary, ARTIFACT), images, images, ["torch"])

    thread = Thread(target=store, name="rehearsal", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()  # torch crashes if it works while the interpreter ends


def log_model(
    run_id: str,
    model: Any,
    *,
    images: NDArray[Any],
    outputs: NDArray[Any],
    requirements: Sequence[str],
    metadata: Mapping[str, Any],
) -> str:
    """Stores a model with a run, as a torch.export program, and returns its id in MLflow. Registers nothing.

    This function does the steps of `mlflow.pytorch.log_model` itself, for three reasons: it pins the device (a program
    exported on the CPU only runs there, but MLflow would move it to a GPU if it finds one, and fail), it uses no global
    run, and it prints nothing. `requirements` is given, so that MLflow need not load the model to infer them.

    Args:
        model: the torch.nn.Module, in evaluation mode on the CPU.
        images: an example input of at least two images, since the export treats a batch size of one as a constant.
        outputs: the model's outputs for it; both define the signature, with any batch size.
        requirements: pinned packages that loading and calling the model need.
        metadata: JSON values to store with the model, for example the names of the classes.

    Raises:
        ServiceError: the temporary folder's disk has too little space, or MLflow failed.
    """
    assert len(images) >= 2
    with mlflow_client(f"store the model of run {run_id}") as client, TemporaryDirectory() as temporary:
        _check_disk_space(Path(temporary), model)
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
            with suppress(MlflowException):  # the first error is the one to report
                client.finalize_logged_model(logged.model_id, "FAILED")
            raise
        client.finalize_logged_model(logged.model_id, "READY")
    return str(logged.model_id)


def _check_disk_space(folder: Path, model: Any) -> None:
    """Raises ServiceError if a folder's disk has too little space for a model: torch's writer would end the process."""
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    if shutil.disk_usage(folder).free < 2 * size + EXTRA_MODEL_BYTES:
        raise ServiceError(
            f"no space left on the disk for {folder}: the model temporarily needs {decimal(size)}; free some space "
            "(`convoy prune` may help) and try again"
        )


def _save(
    model: Any, folder: Path, images: NDArray[Any], outputs: NDArray[Any], requirements: Sequence[str], **more: Any
) -> None:
    import mlflow.pytorch  # only here, since it loads torch, which reading the registry does not need

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
    """Registers a stored model as the next version of `name`, without an alias.

    Raises:
        UsageError: the name is invalid.
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
    with mlflow_client(f"find model {name!r}") as client:
        if none_if_missing(client.get_registered_model, name) is None:
            raise UsageError(f"no model is called {name!r}; MLflow lists them at {page_url('models')}")


def search_versions(**equal: str | Sequence[str]) -> list[RegisteredVersion]:
    """Returns the versions whose attributes (`name`, `run_id`) have these values; those of one model newest first."""
    with mlflow_client("list versions of models") as client:
        condition, newest_first = filter_of(**equal), ["version_number DESC"]
        found = all_pages(client.search_model_versions, filter_string=condition, order_by=newest_first)
    return list(map(registered, found))


def version_of(name: str, run_id: str) -> ModelVersion | None:
    """Returns the newest version of `name` that a run has registered; None if there is none."""
    found = search_versions(name=name, run_id=run_id)
    return ModelVersion(name=name, version=found[0].version) if found else None


def aliased_versions() -> set[tuple[str, str]]:
    """Returns name and version of all versions that have an alias."""
    with mlflow_client("list the registered models") as client:
        models = all_pages(client.search_registered_models)
    return {(model.name, str(version)) for model in models for version in model.aliases.values()}


def set_alias(model: ModelVersion, alias: str) -> None:
    """Points an alias of the model's name at this version."""
    with mlflow_client(f"set alias {alias} of model {model.name!r}") as client:
        client.set_registered_model_alias(model.name, alias, model.version)


def aliased(name: str, alias: str) -> ModelVersion | None:
    """Returns the version that an alias points at; None if there is no such model or alias."""
    with mlflow_client(f"read alias {alias} of model {name!r}") as client:
        found = none_if_missing(client.get_model_version_by_alias, name, alias)
    return ModelVersion(name=name, version=str(found.version)) if found else None


def delete_alias(name: str, alias: str) -> None:
    """Deletes an alias of a model, if it exists."""
    with mlflow_client(f"delete alias {alias} of model {name!r}") as client:
        client.delete_registered_model_alias(name, alias)


def describe_version(model: ModelVersion, markdown: str) -> None:
    """Sets the description on a version's page; cuts it off, with `…`, at MLflow's limit."""
    if len(markdown) > DESCRIPTION_CHARACTERS:
        markdown = markdown[: DESCRIPTION_CHARACTERS - 2] + " …"
    with mlflow_client(f"describe version {model.version} of model {model.name!r}") as client:
        client.update_model_version(model.name, model.version, markdown)


def headed(description: str, first: str) -> str:
    """Returns a description with a first paragraph on the accuracy, in place of an earlier such paragraph, if any.

    The other paragraphs, which people may have written, stay.
    """
    earlier, _, rest = description.partition("\n\n")
    replaced = re.match(r"\d+\.\d\d% |test accuracy unknown, ", earlier)
    return "\n\n".join(filter(None, (first, rest if replaced else description)))


def describe_model(champion: RegisteredVersion) -> None:
    """Begins the description of a model with the result of its champion, which waits for nobody any more."""
    result = champion.record.model_copy(update={"approval": None}).headline
    with mlflow_client(f"describe model {champion.name!r}") as client:
        found = client.get_registered_model(champion.name).description or ""
        first = f"{result}: version {champion.version}, the champion."
        client.update_registered_model(champion.name, headed(found, first)[:DESCRIPTION_CHARACTERS])


def tag_version(model: ModelVersion, tags: Mapping[str, str]) -> None:
    """Sets tags of a version."""
    with mlflow_client(f"tag version {model.version} of model {model.name!r}") as client:
        for name, value in tags.items():
            client.set_model_version_tag(model.name, model.version, name, value)
