"""The result of a training run, as people see it and as scripts read it (`--summary FILE`)."""

import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from infra.errors import UsageError


class Summary(BaseModel):
    """What `convoy train` found. Scripts and CI depend on these names; values that never came to be are left out."""

    model_config = ConfigDict(frozen=True)

    status: Literal["done", "refused", "failed", "interrupted"]
    """`refused`: a gate did not let the data or the model pass."""

    error: str | None = None
    exit_status: int = 0

    accuracy: float | None = None
    """Fraction of the test split that the registered weights classify correctly."""

    weights_sha256: str | None = None
    """Over the tensors in sorted name order."""

    dataset: str | None = None
    dataset_version: str | None = None
    model_name: str | None = None
    model_version: str | None = None
    champion: bool | None = None
    """Whether the version is now the champion; left out where no gate was reached."""

    verdict: str | None = None
    """The quality gate's, in a line."""

    world_size: int | None = None
    train_seconds: float | None = None
    total_seconds: float | None = None
    images_per_second: float | None = None
    mlflow_tracking_uri: str | None = None
    mlflow_run_id: str | None = None
    mlflow_run_url: str | None = None
    prefect_flow_run_id: str | None = None
    prefect_flow_run_url: str | None = None
    checkpoint_prefix: str | None = None
    reused: tuple[str, ...] = ()
    """Steps whose output was there already."""

    def as_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude_none=True)


def check_writable(path: Path) -> None:
    """Raise UsageError now, rather than after a long training, if a summary cannot be written there."""
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise UsageError(f"--summary {path}: cannot write there; name a file in a folder that exists")


def write_summary(path: Path, summary: Summary) -> None:
    """Write the summary as JSON; readers see the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(summary.as_dict(), indent=2) + "\n")
    temporary.replace(path)
