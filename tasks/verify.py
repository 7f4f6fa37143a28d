"""The verify task: the registered model, loaded as strangers do, must say what the evaluated network said."""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from infra.objectstore import ObjectStore
from infra.registry import ModelVersion, set_alias, tag_version
from infra.settings import Settings
from tasks.cancel import stop_if_cancelled
from tasks.evaluate import Evaluation
from tasks.progress import run_logger
from tasks.reference import load_reference

CHALLENGER = "challenger"
BATCH_SIZES = (1, 3, 64)
TOLERANCE = {"cpu": 1e-5, "cuda": 1e-3}
"""Largest difference of a probability, by the device of the evaluation: round-off, with TF32's on a GPU."""

TIME_LIMIT = 600.0  # seconds to import, download, load and predict
CONSUMER = Path(__file__).with_name("consume.py")
CONSUMERS_ENVIRONMENT = {
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",  # MLflow refuses a model that it would have to unpickle
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


class VerificationFailed(RuntimeError):
    """The registered model cannot be loaded, or predicts something else than the evaluated network."""

    exit_status = 1


@task(name="verify", cache_policy=NO_CACHE, persist_result=False)
def verify(registered: ModelVersion, evaluated: Evaluation) -> None:
    """Load the version in a fresh process, compare its predictions, and only then point `challenger` at it.

    A version that fails stays for inspection, without an alias, with the tag `convoy.verification=failed`.

    Raises:
        Cancelled: the flow run was cancelled.
        VerificationFailed: it is not the model that was evaluated.
        ServiceError: a server failed.
    """
    stop_if_cancelled()
    reference = load_reference(ObjectStore.connect(Settings().bucket, create=False), evaluated.reference_key)
    try:
        worst = _largest_difference(registered, reference)
        if not worst <= TOLERANCE[evaluated.device]:  # so that NaN fails too
            raise VerificationFailed(
                f"{registered.uri} is not the evaluated network: a probability differs by {worst:.2g}, "
                f"more than {TOLERANCE[evaluated.device]:g}; it has no alias"
            )
    except VerificationFailed:
        tag_version(registered, {"convoy.verification": "failed"})
        raise
    tag_version(registered, {"convoy.verification": "passed"})
    set_alias(registered, CHALLENGER)
    run_logger().info("%s verified (largest difference %.1e) and now %s", registered.uri, worst, CHALLENGER)


def _largest_difference(registered: ModelVersion, reference: dict[str, Tensor]) -> float:
    """Over all batch sizes, between the predictions of a fresh process and the reference."""
    images, expected = reference["images"], reference["probabilities"]
    sizes = sorted({min(size, len(images)) for size in BATCH_SIZES})
    predictions = _consume(registered.uri, images, sizes)
    differences = []
    for size in sizes:
        got = predictions[str(size)]
        if got.shape != expected[:size].shape:
            raise VerificationFailed(
                f"{registered.uri} gives {tuple(got.shape)} for a batch of {size}, "
                f"expected {tuple(expected[:size].shape)}; it has no alias"
            )
        differences.append((got - expected[:size]).abs().max())
    return float(torch.stack(differences).max())  # NaN if any is


def _consume(uri: str, images: Tensor, sizes: list[int]) -> dict[str, Tensor]:
    with TemporaryDirectory() as temporary:
        given, made = Path(temporary) / "images.safetensors", Path(temporary) / "predictions.safetensors"
        save_file({"images": images}, given)
        # -P keeps our own modules off its path: the model has to work where Convoy is not installed.
        command = [sys.executable, "-P", str(CONSUMER), uri, str(given), str(made), *map(str, sizes)]
        try:
            done = subprocess.run(
                command,
                cwd=temporary,
                env=os.environ | CONSUMERS_ENVIRONMENT,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TIME_LIMIT,
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired:
            raise VerificationFailed(f"{uri} gave no predictions within {TIME_LIMIT:.0f} s; it has no alias") from None
        try:
            return load_file(made)
        except (FileNotFoundError, SafetensorError):
            said = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing"]
            raise VerificationFailed(
                f"{uri} gave no predictions in a fresh process (status {done.returncode}): {said[-1].strip()}"
            ) from None
