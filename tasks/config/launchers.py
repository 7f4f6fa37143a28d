"""Where the ranks of a training run, and on which nodes; the result does not depend on it. Imports pydantic only."""

from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from cnn.config.base import Config
from infra.errors import UsageError

Launcher = Literal["local", "nodes", "ray", "kubernetes"]

NEED_PACKAGE = ("ray", "kubernetes")
"""Launchers that need the package of the same name, which a plain installation lacks."""


class NodesConfig(Config):
    """Training on several nodes, with any launcher; the result does not depend on it (`nodes.*`)."""

    min: int = Field(1, ge=1)
    """Least nodes to train on; with fewer, training pauses."""

    max: int | None = Field(None, ge=1)
    """Most nodes to train on at a time; further nodes stand by. Unset: as many as add ranks."""

    here: bool = True
    """Whether this machine is one of the nodes."""

    patience: float = Field(30.0, ge=5)
    """Seconds without a message after which a node counts as lost; the others continue without it."""

    wait: float = Field(600.0, ge=0)
    """Seconds to wait for `min` nodes before the training ends as interrupted."""

    @model_validator(mode="after")
    def _min_below_max(self) -> "NodesConfig":
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max ({self.max}) is less than min ({self.min})")
        return self


class RayConfig(Config):
    """Agents in a Ray cluster, one per rank (`ray.*`)."""

    address: str | None = None
    """Address of the cluster; this machine must be one of its nodes. Unset: RAY_ADDRESS, or the local cluster."""

    strategy: Literal["PACK", "SPREAD"] = "PACK"
    """Whether ranks run on as few or as many Ray nodes as possible."""

    cpus: float = Field(1.0, ge=0)
    """CPUs that Ray reserves per rank."""

    gpus: int = Field(0, ge=0, le=1)
    """GPUs that Ray reserves per rank; a rank uses one, or none."""


class KubernetesConfig(Config):
    """Agents in the pods of a Job (`kubernetes.*`)."""

    image: str | None = None
    """Container image with Convoy, preferably by digest; the same as the flow's own."""

    namespace: str = "convoy"
    """Namespace of the Job and its pods."""

    pods: int | None = Field(None, ge=1)
    """Number of pods. Unset: as many as hold all ranks."""

    ranks_per_pod: int = Field(1, ge=1)
    """Ranks in each pod."""

    cpus: float = Field(1.0, gt=0)
    """CPUs requested per rank."""

    gpus: int = Field(0, ge=0, le=1)
    """GPUs per rank; a rank uses one, or none."""

    memory: str | None = Field(None, pattern=r"^\d+(Mi|Gi)$")
    """Memory limit per rank; a pod that exceeds its limit is ended. Unset: 2Gi, or 8Gi with a GPU, since CUDA's
    libraries take several."""

    secret: str = "convoy-servers"
    """The Secret that holds the variables of the object storage and of MLflow."""

    service_account: str = "convoy-training"
    """Service account of the pods; its token is not mounted."""

    cache: str | None = None
    """The PersistentVolumeClaim that keeps the pods' cache, so that a later training need not fetch its data again. On
    several machines it needs the access mode ReadWriteMany. Unset: each pod begins with an empty cache."""

    template: Path | None = None
    """Another manifest than infra/kubernetes/training-job.yaml to build the Job on, for example with tolerations."""


class Launch(Config):
    """The part of a run's configuration that says where the ranks run; only the launcher's own section counts."""

    launcher: Launcher = "local"
    nodes: NodesConfig = NodesConfig()
    ray: RayConfig = RayConfig()
    kubernetes: KubernetesConfig = KubernetesConfig()


def check_installed(launcher: Launcher) -> None:
    """Raises UsageError if the launcher's package is not installed."""
    if launcher in NEED_PACKAGE and find_spec(launcher) is None:
        raise UsageError(
            f"launcher={launcher} needs a package that is not installed: pip install 'convoy-cnn[{launcher}]'"
        )
