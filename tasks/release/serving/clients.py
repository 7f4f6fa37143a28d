"""Uses a registered model as outside users do: through `mlflow.pyfunc` in a fresh process, and over HTTP."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import NamedTuple, Self

import httpx
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cnn.networks.own import CONVOYS
from infra.stack.ports import PORT_RANGE, is_free
from infra.stack.processes import log_end
from infra.tracking.model_versions import LOADING_ENVIRONMENT

BATCH_SIZES = (1, 3, 64)
FRESH_PROCESS = Path(__file__).with_name("fresh_process.py")
POLL_SECONDS = 0.1  # between requests to a starting server
STOP_SECONDS = 15.0  # after them, the server's process is killed; more than twice STOP_SECONDS of http_server.py


class ConsumerFailed(RuntimeError):
    """A fresh process or an HTTP server could not use the model."""

    exit_status = 1


class Consumed(NamedTuple):
    """Results of a fresh process."""

    predictions: dict[int, Tensor]
    """float32 size×classes, by batch size."""

    refusals: dict[str, str | None]
    """By kind of wrong input: the message of the refusal, or None if it was not refused."""


def batch_sizes(images: Tensor) -> list[int]:
    """Returns the sizes of the batches to try with these images."""
    return sorted({min(size, len(images)) for size in BATCH_SIZES})


class Consumer:
    """A fresh process that can import neither Convoy nor the user's network; it loads its libraries immediately, and
    waits for a model.

    Leaving the context ends the process and removes its files. If this process is killed, the kernel closes the
    consumer's standard input, and the consumer ends as soon as it reads it.
    """

    def __enter__(self) -> Self:
        self._folder = TemporaryDirectory()
        # The model has to work where Convoy is not installed: -P keeps this program's folder off the path, and the
        # program imports nothing that is `hidden` from it, which an installation or PYTHONPATH may offer.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(FRESH_PROCESS)],
            cwd=self._folder.name,
            env=_environment(self._folder.name),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        with self._process:  # closes its pipes, and waits
            pass
        self._folder.cleanup()

    @property
    def is_waiting(self) -> bool:
        """Whether the process runs and is still unused."""
        assert self._process.stdin
        return not self._process.stdin.closed and self._process.poll() is None

    def predict(
        self, uri: str, images: Tensor, sizes: Sequence[int], time_limit: float, hidden: Sequence[str] = CONVOYS
    ) -> Consumed:
        """Loads a model through `mlflow.pyfunc`, and predicts. A consumer can do so only once.

        Args:
            uri: `models:/name/version`.
            images: uint8 N×C×H×W; handed over as PNG files.
            sizes: batch sizes; each batch holds the first images.
            time_limit: seconds to finish its start, and to download, load and predict.
            hidden: packages that the process cannot import, wherever they lie.

        Raises:
            ConsumerFailed: the process returned no predictions.
        """
        folder = Path(self._folder.name, "images")
        folder.mkdir(exist_ok=True)
        for number, image in enumerate(images):
            pixels = image.permute(1, 2, 0).squeeze(2).numpy()
            Image.fromarray(pixels).save(folder / f"{number:06d}.png")
        task = {
            "uri": uri,
            "images": str(folder),
            "out": self._folder.name,
            "sizes": list(sizes),
            "hidden": list(hidden),
        }
        try:
            _, errors = self._process.communicate(json.dumps(task), timeout=time_limit)
        except subprocess.TimeoutExpired:
            raise ConsumerFailed(f"{uri} gave no predictions within {time_limit:.0f} s") from None
        try:
            made = load_file(Path(self._folder.name, "predictions.safetensors"))
            refusals = json.loads(Path(self._folder.name, "refusals.json").read_bytes())
        except (FileNotFoundError, SafetensorError):
            last_line = (errors.strip() or "no message").splitlines()[-1]
            raise ConsumerFailed(
                f"{uri} gave no predictions in a fresh process (status {self._process.returncode}): {last_line.strip()}"
            ) from None
        return Consumed(predictions={int(size): tensor for size, tensor in made.items()}, refusals=refusals)


class Server:
    """`mlflow models serve` in its own process, which loads its libraries immediately, and waits for a model.

    Leaving the context ends the process with all its child processes, and removes their files. If this process is
    killed, they end by themselves.
    """

    def __enter__(self) -> Self:
        self._folder = TemporaryDirectory()
        self._log = Path(self._folder.name, "log")
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tasks.release.serving.http_server"],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                cwd=FRESH_PROCESS.parents[3],
                env=_environment(self._folder.name),
            )
        self._used = False
        return self

    def __exit__(self, *_: object) -> None:
        self.dismiss()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    @property
    def is_waiting(self) -> bool:
        """Whether the process runs and is still unused."""
        return not self._used and self._process.poll() is None

    def serve(self, uri: str, client: httpx.Client, time_limit: float, not_needed: Event) -> None:
        """Serves a model at a client's address, and returns once it answers. A server can do so only once.

        Raises:
            ConsumerFailed: the model was not served, or `not_needed` was set.
        """
        assert self._process.stdin
        self._used = True
        with suppress(BrokenPipeError):  # the process has ended; the loop below reports it
            self._process.stdin.write(json.dumps({"uri": uri, "port": client.base_url.port}).encode() + b"\n")
            self._process.stdin.flush()
        deadline = time.monotonic() + time_limit
        while self._process.poll() is None:
            try:
                if client.get("/ping", timeout=5.0).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            if time.monotonic() > deadline:
                raise ConsumerFailed(f"{uri} was not served over HTTP within {time_limit:.0f} s: {log_end(self._log)}")
            if not_needed.wait(POLL_SECONDS):
                raise ConsumerFailed(f"{uri} is not needed any more")
        raise ConsumerFailed(
            f"{uri} cannot be served over HTTP (status {self._process.returncode}): {log_end(self._log)}"
        )

    def dismiss(self) -> None:
        """Makes the process end, without waiting for it."""
        assert self._process.stdin
        with suppress(BrokenPipeError):
            self._process.stdin.close()


@contextmanager
def http_server(
    uri: str, time_limit: float, not_needed: Event | None = None, server: Server | None = None
) -> Iterator[httpx.Client]:
    """Serves a model with `mlflow models serve` on a free port of 127.0.0.1; yields a client of the server.

    Args:
        uri: `models:/name/version`.
        time_limit: seconds to start, and per response.
        not_needed: aborts the start once it is set.
        server: the server to use; it is asked to end with the block. None or a used one starts another, none of whose
            processes outlives the block.

    Raises:
        ConsumerFailed: the server did not start.
    """
    port = next(port for port in random.SystemRandom().sample(PORT_RANGE, 200) if is_free(port))
    with ExitStack() as started:
        if server is None or not server.is_waiting:
            server = started.enter_context(Server())
        started.callback(server.dismiss)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=time_limit, trust_env=False) as client:
            server.serve(uri, client, time_limit, not_needed or Event())
            yield client


def post_images(client: httpx.Client, content: object) -> httpx.Response:
    """Requests predictions for `content`, MLflow's `inputs`."""
    return client.post("/invocations", json={"inputs": content})


def _environment(temporary: str) -> dict[str, str]:
    """Returns an environment in which the files that MLflow leaves behind are in a folder that is removed later."""
    return os.environ | LOADING_ENVIRONMENT | {"TMPDIR": temporary}
