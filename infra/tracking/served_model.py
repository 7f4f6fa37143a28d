"""Loads a registered version as a server of models does: by MLflow, from its files."""

from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from mlflow.pyfunc import load_model
from numpy.typing import NDArray

from infra.errors import UsageError, one_line
from infra.tracking.model_registry import RegisteredVersion
from infra.tracking.model_versions import download_version


class ServedModel:
    """A registered version, fetched and loaded when it is first needed.

    Whatever needs it raises UsageError if it is no image classifier of Convoy's, or cannot be loaded here, and
    ServiceError if MLflow failed.

    Args:
        files: the version's, if they have been fetched already.
    """

    def __init__(self, version: RegisteredVersion, files: Path | None = None) -> None:
        self.version, self._files = version, files

    def predict(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Returns probabilities N×classes of raw images N×C×H×W."""
        return np.asarray(self._model.predict(images))

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.metadata["classes"])

    @property
    def metadata(self) -> dict[str, Any]:
        return dict(self._model.metadata.metadata)

    @property
    def shape(self) -> tuple[int, ...]:
        """C, H and W of its images."""
        return tuple(self._model.metadata.signature.inputs.inputs[0].shape[1:])

    @cached_property
    def _model(self) -> Any:
        with TemporaryDirectory() as temporary:
            files = self._files or download_version(self.version, Path(temporary))
            try:
                model = load_model(str(files))
            except Exception as error:  # of torch, of MLflow, of a missing package
                raise UsageError(f"{self.version.uri} cannot be loaded: {one_line(error)[:300]}") from error
        inputs = getattr(model.metadata.signature, "inputs", None)
        shape = getattr(inputs and inputs.inputs[0], "shape", ())
        if "classes" not in (model.metadata.metadata or ()) or len(shape) != 4:
            raise UsageError(f"{self.version.uri} is no image classifier that Convoy has registered")
        return model
