"""The MLflow run of a training: opened before the ranks start, closed with the flow, however it ends."""

import contextlib
import hashlib
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from prefect.context import FlowRunContext
from prefect.exceptions import TerminationSignal
from prefect.utilities.urls import url_for
from pydantic import BaseModel, ConfigDict

import cnn
from cnn.codedigest import code_digest
from cnn.distributed import THREADS_PER_RANK, local_device
from cnn.manifest import canonical_json
from cnn.trainer import check_fits
from infra import tracking
from infra.errors import ServiceError
from infra.objectstore import ObjectStore
from infra.provenance import Provenance, provenance
from infra.settings import Settings
from tasks.cancel import Cancelled
from tasks.checkpoints import checkpoint_prefix
from tasks.config import RunConfig
from tasks.dataset import DatasetRef, load_manifest


class RunManifest(BaseModel):
    """What the weights are a function of. Its digest names the training; equal digests promise equal weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    code_digest: str
    """Of `cnn`, without comments and formatting."""

    dataset_version: str
    config: dict[str, Any]
    lock_sha256: str | None
    torch: str
    device: str
    """`cpu` or `cuda`."""

    instruction_set: str
    """Of the CPU or GPU: other instructions round differently."""

    threads_per_rank: int

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON."""
        return hashlib.sha256(canonical_json(self.model_dump())).hexdigest()


class TrackedRun(BaseModel):
    """An open MLflow run."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    url: str
    manifest_digest: str
    checkpoint_prefix: str


@contextmanager
def tracked_run(config: RunConfig, dataset: DatasetRef) -> Iterator[TrackedRun]:
    """Open the run, and close it as FINISHED, KILLED (cancelled, interrupted) or FAILED.

    Raises:
        ServiceError: the tracking server cannot be reached.
        InputError: the configuration does not fit the dataset; no run is opened.
    """
    settings = Settings()
    check_fits(config.training(), load_manifest(ObjectStore.connect(settings.bucket, create=False), dataset.version))
    code = provenance()
    manifest = run_manifest(config, dataset, code)
    run_id = tracking.start_run(
        experiment=dataset.name,
        run_name=f"{config.model} {config.epochs} epochs",
        params=flatten({"dataset": config.dataset, "data": config.data.model_dump(), **manifest.config}),
        tags=_tags(config, dataset, manifest, code),
    )
    try:
        prefix = f"s3://{settings.bucket}/{checkpoint_prefix(run_id)}"
        tracking.set_tags(run_id, {"convoy.checkpoint_prefix": prefix})
        source = f"s3://{settings.bucket}/datasets/{dataset.version}/manifest.json"
        tracking.log_dataset(run_id, dataset.name, dataset.version, source)
        tracking.log_text(run_id, "manifest.json", manifest.model_dump_json(indent=2))
        yield TrackedRun(
            run_id=run_id, url=tracking.run_url(run_id), manifest_digest=manifest.digest, checkpoint_prefix=prefix
        )
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | TerminationSignal | Cancelled)
        with contextlib.suppress(ServiceError):  # the server may be what failed, and the first error says more
            tracking.end_run(run_id, "KILLED" if stopped else "FAILED")
        raise
    tracking.end_run(run_id, "FINISHED")


def run_manifest(config: RunConfig, dataset: DatasetRef, code: Provenance) -> RunManifest:
    """The manifest of a training on this machine's kind of device."""
    device = local_device().type
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return RunManifest(
        code_digest=code_digest(sorted(Path(cnn.__path__[0]).rglob("*.py"))),
        dataset_version=dataset.version,
        config=config.training().model_dump(mode="json"),
        lock_sha256=code.lock_sha256,
        torch=torch.__version__,
        device=device,
        instruction_set=gpu or f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        threads_per_rank=THREADS_PER_RANK,
    )


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys in dotted form, as in `--set`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _tags(config: RunConfig, dataset: DatasetRef, manifest: RunManifest, code: Provenance) -> dict[str, str]:
    tags = {
        "convoy.model": config.name or dataset.name,
        "convoy.dataset_version": dataset.version,
        "convoy.code_digest": manifest.code_digest,
        "convoy.manifest_digest": manifest.digest,
        **code.as_tags(),
    }
    flow = FlowRunContext.get()
    if flow and flow.flow_run:
        tags["prefect.flow_run_id"] = str(flow.flow_run.id)
        tags["prefect.flow_run_url"] = url_for("flow-run", obj_id=flow.flow_run.id) or ""
    return tags
