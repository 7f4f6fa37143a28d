"""Where the ranks of a training run, and what their nodes are; no part of the result.

Like `tasks.config.run`, importing it loads pydantic only.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, model_validator

from cnn.config.base import Config
from infra.errors import UsageError

Launcher = Literal["local", "nodes", "ray", "kubernetes"]

EXTRAS = ("ray", "kubernetes")
"""Launchers that need a package of their name, which a plain installation lacks."""


class NodesConfig(Config):
    """Training on several nodes, whoever starts their agents; no part of the result (`nodes.*`)."""

    min: int = Field(1, ge=1)
    """Nodes to wait for; with fewer left, training pauses."""

    max: int | None = Field(None, ge=1)
    """Nodes that train at a time, at most. Further ones stand by. Unset: as many as add ranks."""

    here: bool = True
    """This machine is one of them."""

    patience: float = Field(30.0, ge=5)
    """Seconds of silence after which a node is lost, and the others go on without it."""

    wait: float = Field(600.0, ge=0)
    """Seconds to wait for `min` nodes before the training ends as interrupted."""

    @model_validator(mode="after")
    def _min_below_max(self) -> "NodesConfig":
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max ({self.max}) is less than min ({self.min})")
        return self


class RayConfig(Config):
    """Agents in a Ray cluster, one a rank (`ray.*`)."""

    address: str | None = None
    """Of the cluster, which this machine must be a node of. Unset: RAY_ADDRESS, or the cluster that runs here."""

    strategy: Literal["PACK", "SPREAD"] = "PACK"
    """Whether ranks share as few or as many Ray nodes as they can."""

    cpus: float = Field(1.0, ge=0)
    """That Ray sets aside for each rank."""

    gpus: int = Field(0, ge=0, le=1)
    """Likewise; a rank uses one, or none."""


class KubernetesConfig(Config):
    """Agents in the pods of a Job (`kubernetes.*`)."""

    image: str | None = None
    """Container image that holds Convoy, best by digest; the one that the flow runs in."""

    namespace: str = "convoy"

    pods: int | None = Field(None, ge=1)
    """Unset: as many as hold all ranks."""

    ranks_per_pod: int = Field(1, ge=1)

    cpus: float = Field(1.0, gt=0)
    """Of a rank, requested."""

    gpus: int = Field(0, ge=0, le=1)
    """Of a rank, which uses one, or none."""

    memory: str = Field("2Gi", pattern=r"^\d+(Mi|Gi)$")
    """Of a rank; more than that ends its pod."""

    secret: str = "convoy-servers"
    """The Secret that holds the variables of the object storage and of MLflow."""

    service_account: str = "convoy-training"
    """Of the pods, which are given no token of it."""

    template: Path | None = None
    """Another manifest than infra/kubernetes/training-job.yaml to build the Job on: tolerations, node selectors, …"""


class Launch(Config):
    """Where the ranks of a job run: on this machine, or on it and on nodes that join; made of a run's configuration."""

    launcher: Literal["local", "nodes"] = "local"
    nodes: NodesConfig = NodesConfig()


class RayLaunch(Config):
    """In actors of a Ray cluster."""

    launcher: Literal["ray"] = "ray"
    nodes: NodesConfig = NodesConfig()
    ray: RayConfig = RayConfig()


class KubernetesLaunch(Config):
    """In the pods of a Job."""

    launcher: Literal["kubernetes"] = "kubernetes"
    nodes: NodesConfig = NodesConfig()
    kubernetes: KubernetesConfig = KubernetesConfig()


AnyLaunch = Annotated[Launch | RayLaunch | KubernetesLaunch, Field(discriminator="launcher")]


def launch_of(config: object) -> AnyLaunch:
    """Returns the part of a run's configuration that its launcher needs."""
    return TypeAdapter[AnyLaunch](AnyLaunch).validate_python(config, from_attributes=True)


def check_installed(launcher: Launcher) -> None:
    """See that the launcher's package is there.

    Raises:
        UsageError: it is not.
    """
    if launcher in EXTRAS and find_spec(launcher) is None:
        raise UsageError(
            f"launcher={launcher} needs a package that is not installed: pip install 'convoy-cnn[{launcher}]'"
        )
