"""Uses a registered model as outside users do: through `mlflow.pyfunc` in a fresh process, and over HTTP."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from threading import Event, RLock
from typing import IO, NamedTuple, Self

import httpx
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cnn.networks.own import CONVOYS
from infra.errors import Outage
from infra.machine import stopping
from infra.stack.ports import PORT_RANGE, is_free
from infra.stack.processes import log_end
from infra.tracking.model_versions import LOADING_ENVIRONMENT

BATCH_SIZES = (1, 3, 64)
FRESH_PROCESS = Path(__file__).with_name("fresh_process.py")
POLL_SECONDS = 0.1  # between checks of a process that starts or works
STATUS_SECONDS = 2.0  # from the end of a process until its status must be there
STOP_SECONDS = 10.0  # after them, processes that were asked to end are killed


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


class FreshProcesses:
    """Starts processes that use a model, and can import neither Convoy nor the user's network.

    They are forked from one that loads their libraries, which takes seconds and some hundred megabytes: `load_early`
    starts it while the model is still being made.

    Leaving the context ends all of them, and removes their files. If this process is killed, the kernel closes the
    other's standard input, and they end by themselves.
    """

    def __enter__(self) -> Self:
        self._process: subprocess.Popen[bytes] | None = None
        self._starting = RLock()
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def load_early(self) -> None:
        """Starts to load the libraries, as far as the machine has the resources now."""
        with suppress(OSError):
            self.load()

    def load(self) -> None:
        """Starts to load the libraries, unless a process has them already; also after `dismiss`."""
        if self._process and self._process.poll() is None and not self._input.closed:
            return
        self._end()
        self._folder = TemporaryDirectory(ignore_cleanup_errors=True)  # killed processes may still write there
        self._log = Path(self._folder.name, "log")
        self._unused = True
        with self._log.open("wb") as output:
            # The model has to work where Convoy is not installed: -P keeps this program's folder off the path, and the
            # program imports nothing that is `hidden` from it, which an installation or PYTHONPATH may offer.
            # In its own session, no Ctrl-C of the terminal reaches it.
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(FRESH_PROCESS)],
                cwd=self._folder.name,
                env=_environment(self._folder.name),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def dismiss(self) -> None:
        """Makes all processes end, without waiting for it; none starts any more until `load`."""
        with self._starting, suppress(BrokenPipeError):
            if self._process:
                self._input.close()

    def predict(
        self, uri: str, images: Tensor, sizes: Sequence[int], time_limit: float, hidden: Sequence[str] = CONVOYS
    ) -> Consumed:
        """Loads a model through `mlflow.pyfunc` in a process, and predicts.

        Args:
            uri: `models:/name/version`.
            images: uint8 N×C×H×W; handed over as PNG files.
            sizes: batch sizes; each batch holds the first images.
            time_limit: seconds to finish its start, and to download, load and predict.
            hidden: packages that the process cannot import, wherever they lie.

        Raises:
            ConsumerFailed: the process returned no predictions.
            Outage: the process was killed.
            Stopped: a signal has arrived.
        """
        folder = self._new_folder()
        (folder / "images").mkdir()
        for number, image in enumerate(images):
            pixels = image.permute(1, 2, 0).squeeze(2).numpy()
            Image.fromarray(pixels).save(folder / "images" / f"{number:06d}.png")
        self._start("predict", folder, hidden, uri=uri, sizes=list(sizes))
        deadline = time.monotonic() + time_limit
        while (status := self._status(folder)) is None:
            if time.monotonic() > deadline:
                raise ConsumerFailed(f"{uri} gave no predictions within {time_limit:.0f} s")
            stopping.sleep(POLL_SECONDS)
        try:
            made = load_file(folder / "predictions.safetensors")
            refusals = json.loads((folder / "refusals.json").read_bytes())
        except (FileNotFoundError, SafetensorError):
            told = f"(status {status}): {self._told(folder, lines=1)}"
            raise ConsumerFailed(f"{uri} gave no predictions in a fresh process {told}") from None
        return Consumed(predictions={int(size): tensor for size, tensor in made.items()}, refusals=refusals)

    @contextmanager
    def serve(
        self, uri: str, time_limit: float, hidden: Sequence[str] = CONVOYS, not_needed: Event | None = None
    ) -> Iterator[httpx.Client]:
        """Serves a model over HTTP in a process, on a free port of 127.0.0.1; yields a client of the server.

        The server runs until `dismiss`, or until the context of this object ends.

        Args:
            uri: `models:/name/version`.
            time_limit: seconds to start, and per response.
            hidden: packages that the process cannot import, wherever they lie.
            not_needed: aborts the start once it is set.

        Raises:
            ConsumerFailed: the server did not start, or `not_needed` was set.
            Outage: the server was killed, now or while the client is used.
        """
        port = next(port for port in random.SystemRandom().sample(PORT_RANGE, 200) if is_free(port))
        folder = self._new_folder()
        self._start("serve", folder, hidden, uri=uri, port=port)
        deadline = time.monotonic() + time_limit
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=time_limit, trust_env=False) as client:
            while not _answers(client):
                if (status := self._status(folder)) is not None:
                    told = f"(status {status}): {self._told(folder)}"
                    raise ConsumerFailed(f"{uri} cannot be served over HTTP {told}")
                if time.monotonic() > deadline:
                    told = f"within {time_limit:.0f} s: {self._told(folder)}"
                    raise ConsumerFailed(f"{uri} was not served over HTTP {told}")
                if not_needed and not_needed.is_set():
                    raise ConsumerFailed(f"{uri} is not needed any more")
                time.sleep(POLL_SECONDS)
            try:
                yield client
            except (httpx.NetworkError, httpx.RemoteProtocolError):
                deadline = time.monotonic() + STATUS_SECONDS
                while self._status(folder) is None and time.monotonic() < deadline:
                    time.sleep(POLL_SECONDS)
                raise

    def _new_folder(self) -> Path:
        with self._starting:
            if not self._process:
                self.load()
            return Path(mkdtemp(dir=self._folder.name))

    def _start(self, kind: str, folder: Path, hidden: Sequence[str], **task: object) -> None:
        line = json.dumps({"kind": kind, "folder": str(folder), "hidden": list(hidden), **task}).encode() + b"\n"
        with self._starting, suppress(BrokenPipeError):  # the process has ended; its status says it
            if self._input.closed:
                raise ConsumerFailed("the processes that use the model were dismissed")
            self._unused = False
            self._input.write(line)
            self._input.flush()

    def _end(self) -> None:
        """Ends all processes, and waits for it."""
        self.dismiss()
        if not self._process:
            return
        if self._unused:  # it may still load its libraries, and would not notice
            self._process.kill()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()  # the kernel then kills the others
            self._process.wait()
        self._folder.cleanup()

    @property
    def _input(self) -> IO[bytes]:
        assert self._process and self._process.stdin
        return self._process.stdin

    def _status(self, folder: Path) -> int | None:
        """Returns the exit status of a task's process, or of the one that would start it; None if they run.

        Raises:
            Outage: it was killed, which tells nothing about the model.
        """
        assert self._process
        status = self._process.poll()
        with suppress(FileNotFoundError):
            status = int((folder / "status").read_text())
        if status == -signal.SIGKILL:
            raise Outage("a process that tried the model was killed, as happens when memory runs out")
        return status

    def _told(self, folder: Path, lines: int = 3) -> str:
        """Returns the end of a task's log; if it was not started, of the log of what should have started it."""
        log = folder / "log"
        return log_end(log if log.exists() else self._log, lines)


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/ping", timeout=5.0).status_code == 200
    except httpx.HTTPError:
        return False


def post_images(client: httpx.Client, content: object) -> httpx.Response:
    """Requests predictions for `content`, MLflow's `inputs`."""
    return client.post("/invocations", json={"inputs": content})


def _environment(temporary: str) -> dict[str, str]:
    """Returns an environment in which the files that MLflow leaves behind are in a folder that is removed later."""
    return os.environ | LOADING_ENVIRONMENT | {"TMPDIR": temporary}
