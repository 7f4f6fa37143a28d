"""Using a registered model as strangers do: through `mlflow.pyfunc` in a fresh process, and over HTTP."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Self

import httpx
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from infra.stack.ports import PORT_RANGE, is_free
from infra.stack.processes import log_end
from infra.tracking.model_versions import LOADING_ENVIRONMENT

BATCH_SIZES = (1, 3, 64)
CONSUMER = Path(__file__).with_name("fresh_process.py")
POLL = 0.1  # seconds between questions to a server that starts
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


class Consumer:
    """A fresh process that knows nothing of Convoy; it loads its libraries at once, and waits for a model to use.

    A context, after which the process and its files are gone. If this process is killed, the kernel closes the
    consumer's standard input, and it ends as soon as it looks for a model.
    """

    def __enter__(self) -> Self:
        self._folder = TemporaryDirectory()
        # -P keeps our own modules off its path: the model has to work where Convoy is not installed.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(CONSUMER)],
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
        """Whether it has not been used, and lives."""
        assert self._process.stdin
        return not self._process.stdin.closed and self._process.poll() is None

    def predict(self, uri: str, images: Tensor, sizes: Sequence[int], time_limit: float) -> Consumed:
        """Loads a model through `mlflow.pyfunc`, and predicts; once per consumer.

        Args:
            uri: `models:/name/version`.
            images: uint8 N×C×H×W; they travel as PNG files.
            sizes: of the batches, each of the first images.
            time_limit: seconds for the rest of its start, and to download, load and predict.

        Raises:
            ConsumerFailed: it gave no predictions.
        """
        given = Path(self._folder.name, "images")
        given.mkdir(exist_ok=True)
        for number, image in enumerate(images):
            pixels = image.permute(1, 2, 0).squeeze(2).numpy()
            Image.fromarray(pixels).save(given / f"{number:06d}.png")
        task = {"uri": uri, "images": str(given), "out": self._folder.name, "sizes": list(sizes)}
        try:
            _, errors = self._process.communicate(json.dumps(task), timeout=time_limit)
        except subprocess.TimeoutExpired:
            raise ConsumerFailed(f"{uri} gave no predictions within {time_limit:.0f} s") from None
        try:
            made = load_file(Path(self._folder.name, "predictions.safetensors"))
            refusals = json.loads(Path(self._folder.name, "refusals.json").read_bytes())
        except (FileNotFoundError, SafetensorError):
            said = [line for line in errors.splitlines() if line.strip()] or ["nothing"]
            raise ConsumerFailed(
                f"{uri} gave no predictions in a fresh process (status {self._process.returncode}): {said[-1].strip()}"
            ) from None
        return Consumed(predictions={int(size): tensor for size, tensor in made.items()}, refusals=refusals)


class Server:
    """`mlflow models serve` in a process of its own; it loads its libraries at once, and waits for a model to serve.

    A context, after which the process and all that it has started are gone, with their files. If this process is
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
                cwd=CONSUMER.parents[3],
                env=_environment(self._folder.name),
            )
        self._used = False
        return self

    def __exit__(self, *_: object) -> None:
        self.dismiss()
        try:
            self._process.wait(ENDS_WITHIN)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    @property
    def is_waiting(self) -> bool:
        """Whether it has not been used, and lives."""
        return not self._used and self._process.poll() is None

    def serve(self, uri: str, client: httpx.Client, time_limit: float, given_up: Event) -> None:
        """Serves a model at a client's address; once per server. Returns when it answers.

        Raises:
            ConsumerFailed: it did not start.
        """
        assert self._process.stdin
        self._used = True
        with suppress(BrokenPipeError):  # it has ended, as is said below
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
            if given_up.wait(POLL):
                raise ConsumerFailed(f"{uri} is not needed any more")
        raise ConsumerFailed(
            f"{uri} cannot be served over HTTP (status {self._process.returncode}): {log_end(self._log)}"
        )

    def dismiss(self) -> None:
        """Has it end, without waiting for that."""
        assert self._process.stdin
        with suppress(BrokenPipeError):
            self._process.stdin.close()


@contextmanager
def http_server(
    uri: str, time_limit: float, given_up: Event | None = None, server: Server | None = None
) -> Iterator[httpx.Client]:
    """Serve a model with `mlflow models serve` on a free port of 127.0.0.1; yields a client of it.

    Args:
        uri: `models:/name/version`.
        time_limit: seconds to start, and for each answer.
        given_up: set when nobody needs the server any more; its start is then broken off.
        server: the one to use, which is told to end with the block; None, or a used one, starts another, of which no
            process is left when the block ends.

    Raises:
        ConsumerFailed: it did not start.
    """
    port = next(port for port in random.SystemRandom().sample(PORT_RANGE, 200) if is_free(port))
    with ExitStack() as started:
        if server is None or not server.is_waiting:
            server = started.enter_context(Server())
        started.callback(server.dismiss)
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=time_limit, trust_env=False)
        with client:
            server.serve(uri, client, time_limit, given_up or Event())
            yield client


def post_images(client: httpx.Client, content: object) -> httpx.Response:
    """Ask a server for the predictions of `content`, given as MLflow's `inputs`."""
    return client.post("/invocations", json={"inputs": content})


def _environment(temporary: str) -> dict[str, str]:
    """Has MLflow put the files of the model, which it leaves behind, where they are removed with the rest."""
    return os.environ | LOADING_ENVIRONMENT | {"TMPDIR": temporary}
