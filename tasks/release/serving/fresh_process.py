"""Uses registered models in processes that know only their URI, as outside users do; clients.py starts this program.

    python -P fresh_process.py        with a task per line of its input: {"kind": …, "folder": …, …}, see `KINDS`

It loads the libraries that models need before it reads its input, and forks a process per task, whose output goes to
<folder>/log; <folder>/status appears when the process has ended. Like those of any model server, the processes cannot
import Convoy, nor the user's network: the packages that a task's `hidden` names, even if they are installed. When the
input ends, so do all processes, however the one that started this program has ended.
"""

import ctypes
import json
import os
import select
import shlex
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import mlflow.artifacts
import mlflow.pyfunc
import numpy as np
import uvicorn.main
from mlflow.pyfunc import scoring_server
from PIL import Image
from safetensors.numpy import save_file

POLL_SECONDS = 0.05  # between checks of whether a process has ended
PR_SET_PDEATHSIG = 1

NEEDED = ("torch.export.pt2_archive", "torch.export._trace", "sympy.tensor.tensor", "mlflow.pytorch")
"""Modules that MLflow and PyTorch import only when they load the first model of a process, which takes seconds."""


class Hide:
    """Refuses to import some packages; stands before all finders that may know them."""

    def __init__(self, packages: Sequence[str]) -> None:
        self._packages = packages

    def find_spec(self, name: str, *_: object) -> None:
        if name.partition(".")[0] in self._packages:
            raise ModuleNotFoundError(f"the model needs {name}, which its users do not have", name=name)


def predict(folder: Path, uri: str, sizes: Sequence[int]) -> None:
    """Predicts batches of the images in <folder>/images, PNG files in the order of their names.

    <folder>/predictions.safetensors holds the predictions of the first images, by size of the batch;
    <folder>/refusals.json, for inputs that the model must refuse, the error messages, or null where no error was
    raised.
    """
    pixels = [np.asarray(Image.open(file)) for file in sorted((folder / "images").glob("*.png"))]
    images = np.stack([plane[None] if plane.ndim == 2 else plane.transpose(2, 0, 1) for plane in pixels])
    model = mlflow.pyfunc.load_model(uri)
    wrong = {
        "another height": images[:, :, 1:],
        "another number of channels": np.concatenate([images, images[:, :1]], axis=1),
        "no batch": images[0],
        "floats": (images / 255).astype(np.float32),
        "text": np.array(["an image"]),
    }
    refusals: dict[str, str | None] = {}
    for name, value in wrong.items():
        try:
            model.predict(value)
            refusals[name] = None
        except Exception as error:
            message = str(error).rpartition("Error: ")[2]  # MLflow repeats the whole input before the message
            refusals[name] = " ".join(message.split())[:300] or type(error).__name__
    (folder / "refusals.json").write_text(json.dumps(refusals))
    batches = {str(size): np.ascontiguousarray(model.predict(images[:size])) for size in sizes}
    save_file(batches, folder / "predictions.safetensors")


def serve(folder: Path, uri: str, port: int) -> None:
    """Serves the model at 127.0.0.1, by the command that `mlflow models serve` starts, in this process."""
    model = mlflow.artifacts.download_artifacts(uri)
    command, environment = scoring_server.get_cmd(model, port, "127.0.0.1", nworkers=1)  # type: ignore[arg-type]
    os.environ.update(environment)
    uvicorn.main.main(shlex.split(command)[1:])


KINDS: dict[str, Callable[..., None]] = {"predict": predict, "serve": serve}


def main() -> None:
    _load_libraries()
    running: dict[int, Path] = {}
    with open(0, "rb", buffering=0) as tasks:  # a buffer would hide lines from `select`
        while True:
            for process in list(running):
                if (ended := os.waitpid(process, os.WNOHANG))[0]:
                    _write_status(running.pop(process), os.waitstatus_to_exitcode(ended[1]))
            if not select.select([tasks], [], [], POLL_SECONDS if running else None)[0]:
                continue
            if not (line := tasks.readline()):
                break
            task = json.loads(line)
            running[_fork(task)] = Path(task["folder"])
    for process in running:
        os.kill(process, signal.SIGKILL)
    for process in running:
        os.waitpid(process, 0)
    os._exit(0)  # the interpreter would take a second to take its modules apart


def _load_libraries() -> None:
    """Does once what each forked process would do for its model, as far as these versions of the libraries have it."""
    for name in NEEDED:
        with suppress(ImportError):
            import_module(name)
    with suppress(ImportError):
        from mlflow.utils.requirements_utils import warn_dependency_requirement_mismatches

        warn_dependency_requirement_mismatches(["mlflow"])  # it lists all installed packages, and keeps the list


def _fork(task: dict[str, Any]) -> int:
    """Starts a process for a task; returns its id."""
    # As `infra.machine.lifeline.die_with_parent`, which this program must not import.
    parent = os.getpid()
    if process := os.fork():
        return process
    status = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:  # else it was killed before the kernel knew what to do then
            _run(**task)
            status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _run(kind: str, folder: str, hidden: Sequence[str], **task: Any) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # the tasks are not for this process
    log = os.open(Path(folder, "log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for output in (1, 2):
        os.dup2(log, output)
    os.environ["TMPDIR"], tempfile.tempdir = folder, None
    assert not sys.modules.keys() & hidden, "what is hidden is loaded"
    sys.meta_path.insert(0, Hide(hidden))  # type: ignore[arg-type]
    KINDS[kind](Path(folder), **task)


def _write_status(folder: Path, status: int) -> None:
    (folder / "status.new").write_text(str(status))
    (folder / "status.new").rename(folder / "status")


if __name__ == "__main__":
    main()
