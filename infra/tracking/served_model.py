"""Loads a registered version with MLflow from its files, as a model server does."""

import logging
from collections.abc import Iterator
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from mlflow.pyfunc import load_model
from numpy.typing import NDArray

from infra.errors import UsageError, one_line
from infra.tracking.model_registry import RegisteredVersion
from infra.tracking.model_versions import download_version

logger = logging.getLogger(__name__)


class ServedModel:
    """A registered version that is downloaded and loaded when it is first used.

    The first use raises UsageError if the version is not an image classifier of Convoy or cannot be loaded here, and
    ServiceError if MLflow failed.

    Args:
        files: the version's files, if they have been downloaded already.
    """

    def __init__(self, version: RegisteredVersion, files: Path | None = None) -> None:
        self.version, self._files = version, files

    def predict(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Returns probabilities N×classes for raw images N×C×H×W."""
        return np.asarray(self._model.predict(images))

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.metadata["classes"])

    @property
    def metadata(self) -> dict[str, Any]:
        return dict(self._model.metadata.metadata)

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns C, H and W of its images."""
        return tuple(self._model.metadata.signature.inputs.inputs[0].shape[1:])

    @property
    def resize(self) -> str:
        """Returns how rectangular images become squares (`data.resize`); older versions, which do not say it, crop."""
        return str(self.metadata.get("resize", "crop"))

    @cached_property
    def _model(self) -> Any:
        with TemporaryDirectory() as temporary:
            files = self._files or download_version(self.version, Path(temporary))
            if others := ", ".join(_other_versions(files)):
                logger.warning("%s was made with %s; its predictions may differ", self.version.uri, others)
            try:
                model = load_model(str(files), suppress_warnings=True)  # MLflow's own check of versions takes a second
            except Exception as error:  # from torch, MLflow or a missing package
                raise UsageError(f"{self.version.uri} cannot be loaded: {one_line(error)[:300]}") from error
        inputs = getattr(model.metadata.signature, "inputs", None)
        shape = getattr(inputs and inputs.inputs[0], "shape", ())
        if "classes" not in (model.metadata.metadata or ()) or len(shape) != 4:
            raise UsageError(f"{self.version.uri} is no image classifier that Convoy has registered")
        return model


def _other_versions(files: Path) -> Iterator[str]:
    """Yields the packages that a model needs, and of which another version, or none, is installed here."""
    requirements = files / "requirements.txt"
    for line in requirements.read_text().splitlines() if requirements.exists() else ():
        package, pinned, needed = line.partition("==")
        if not pinned:
            continue
        try:
            here = version(package)
        except PackageNotFoundError:
            here = "none"
        if needed.partition("+")[0] != here.partition("+")[0]:  # which may be PyTorch for GPUs, or for CPUs
            yield f"{package} {needed} (here: {here})"
