"""Using a registered model as strangers do: through `mlflow.pyfunc` in a fresh process, and over HTTP."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from infra.ports import CHOICE, is_free
from infra.processes import log_end
from infra.versions import CONSUMERS_ENVIRONMENT

BATCH_SIZES = (1, 3, 64)
CONSUMER = Path(__file__).with_name("consume.py")
POLL = 0.2  # seconds between questions to a server that starts
ENDS_WITHIN = 15.0  # seconds that a server has to end; twice its own patience and more


class ConsumerFailed(RuntimeError):
    """A stranger could not use the model."""

    exit_status = 1


@dataclass(frozen=True, kw_only=True)
class Consumed:
    """What a stranger got."""

    predictions: dict[int, Tensor]
    """float32 size×classes, by batch size."""

    refusals: dict[str, str | None]
    """By kind of wrong input: the message that refused it, or None if it was taken."""


def batch_sizes(images: Tensor) -> list[int]:
    """Sizes of the batches to try with so many images."""
    return sorted({min(size, len(images)) for size in BATCH_SIZES})


def fresh_process(uri: str, images: Tensor, sizes: Sequence[int], time_limit: float) -> Consumed:
    """Load a model through `mlflow.pyfunc` in a process that knows nothing of Convoy, and predict.

    Args:
        uri: `models:/name/version`.
        images: uint8 N×C×H×W; they travel as PNG files.
        sizes: of the batches, each of the first images.
        time_limit: seconds to import, download, load and predict.

    Raises:
        ConsumerFailed: it gave no predictions.
    """
    with TemporaryDirectory() as temporary:
        given = Path(temporary, "images")
        given.mkdir()
        for number, image in enumerate(images):
            pixels = image.permute(1, 2, 0).squeeze(2).numpy()
            Image.fromarray(pixels).save(given / f"{number:06d}.png")
        # -P keeps our own modules off its path: the model has to work where Convoy is not installed.
        command = [sys.executable, "-P", str(CONSUMER), uri, str(given), temporary, *map(str, sizes)]
        try:
            done = subprocess.run(
                command,
                cwd=temporary,
                env=_environment(temporary),
                capture_output=True,
                text=True,
                errors="replace",
                timeout=time_limit,
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired:
            raise ConsumerFailed(f"{uri} gave no predictions within {time_limit:.0f} s") from None
        try:
            made = load_file(Path(temporary, "predictions.safetensors"))
            refusals = json.loads(Path(temporary, "refusals.json").read_bytes())
        except (FileNotFoundError, SafetensorError):
            said = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing"]
            raise ConsumerFailed(
                f"{uri} gave no predictions in a fresh process (status {done.returncode}): {said[-1].strip()}"
            ) from None
    return Consumed(predictions={int(size): tensor for size, tensor in made.items()}, refusals=refusals)


@contextmanager
def http_server(uri: str, time_limit: float) -> Iterator[httpx.Client]:
    """Serve a model with `mlflow models serve` on a free port of 127.0.0.1; yields a client of it.

    No process of the server is left when the block ends, or when this process does.

    Args:
        uri: `models:/name/version`.
        time_limit: seconds to start, and for each answer.

    Raises:
        ConsumerFailed: it did not start.
    """
    port = next(port for port in random.SystemRandom().sample(CHOICE, 200) if is_free(port))
    with TemporaryDirectory() as temporary:
        log = Path(temporary, "log")
        with log.open("wb") as output:
            server = subprocess.Popen(
                [sys.executable, "-m", "tasks.modelserver", uri, str(port)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                cwd=CONSUMER.parents[1],
                env=_environment(temporary),
            )
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=time_limit, trust_env=False) as client:
                _wait_for(client, server, log, uri, time_limit)
                yield client
        finally:
            try:
                server.communicate(timeout=ENDS_WITHIN)  # closes its standard input
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def post_images(client: httpx.Client, content: object) -> httpx.Response:
    """Ask a server for the predictions of `content`, given as MLflow's `inputs`."""
    return client.post("/invocations", json={"inputs": content})


def _environment(temporary: str) -> dict[str, str]:
    """Has MLflow put the files of the model, which it leaves behind, where they are removed with the rest."""
    return os.environ | CONSUMERS_ENVIRONMENT | {"TMPDIR": temporary}


def _wait_for(client: httpx.Client, server: subprocess.Popen[bytes], log: Path, uri: str, time_limit: float) -> None:
    deadline = time.monotonic() + time_limit
    while server.poll() is None:
        try:
            if client.get("/ping", timeout=5.0).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        if time.monotonic() > deadline:
            raise ConsumerFailed(f"{uri} was not served over HTTP within {time_limit:.0f} s: {log_end(log)}")
        time.sleep(POLL)
    raise ConsumerFailed(f"{uri} cannot be served over HTTP (status {server.returncode}): {log_end(log)}")
