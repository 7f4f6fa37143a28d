"""The messages between the train task and the processes of a training: files in the training's own folder.

job.json             the task's order to train
events.jsonl         rank 0's progress, one event per line
train.log            what ranks and torchrun print; train.log.1 … of earlier starts
model.safetensors    the final weights
trace.json.gz        what PyTorch's profiler recorded, if asked for
stopped              exists once the ranks have reached the agreed step of a stop and store its checkpoint
outcome.json         how the training ended, written by the first rank that ends with a result or an error
"""

import operator
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError

from cnn.config.training import TrainConfig
from infra.errors import one_line
from infra.records import Record
from tasks.config.launchers import Launch
from tasks.config.run import CheckpointConfig
from tasks.training.protocol.memory_file import memory_file
from tasks.training.utilisation import Utilisation

SPARE_OUTCOME = "CONVOY_SPARE_OUTCOME"  # variable: path of the memory file of `spare_outcome`

STARTING = "starting the ranks"  # what a training waits for first, and after each restart

Status = Literal["finished", "paused", "interrupted", "failed", "diverged", "unsaved", "crashed"]

Line = Annotated[str, AfterValidator(one_line)]
"""Text for people, joined to one line: errors of libraries, above all of PyTorch, have several."""

KILLED = r"rank +: (\d+) .*\n *exitcode +: -\d+ \(pid: \d+\) +\((%s)\)"
"""How torchrun's log reports that a signal ended a rank."""

KILLED_FIRST = re.compile(KILLED % r"(?!SIGTERM)SIG\w+")
TERMINATED = re.compile(r"Root Cause.*\n.*\n.*\n.*\n *" + KILLED % "SIGTERM")  # torchrun then sends it to all ranks


class Job(Record, extra="forbid"):
    """An order to train."""

    run_id: str
    config: TrainConfig
    dataset_version: str
    world_size: int
    """Exact for a training on this machine; the maximum for several nodes."""

    launch: Launch = Launch()
    manifest_digest: str
    code_digest: str = ""
    """`Platform.code_digest` of the code that the training began with: each rank checks that it has loaded the same.
    Empty in jobs of earlier versions of Convoy, which had other code."""

    network_files: dict[str, str] = Field(default_factory=dict)
    """Files of a network of one's own (`Platform.network_files`): each rank checks that it has loaded the same."""

    checkpoints: CheckpointConfig
    restarts: int
    profile: int = 0
    """Steps to trace."""

    until_epoch: int | None = None
    """Pause at the end of this epoch; a later job for the same run goes on."""


class Event(Record, extra="forbid"):
    """Progress of a training (`step` of `total_steps` steps in `epoch`, both counted from 1), a warning or a note.

    With `waiting`, `step` is the one from which the training is about to go on.
    """

    step: int = 0
    total_steps: int = 0
    epoch: int = 0
    loss: float | None = None
    images_per_second: float | None = None
    val_accuracy: float | None = None
    warning: Line | None = None
    """A problem that people should know about."""

    note: Line | None = None
    """What the training does now, for people."""

    waiting: Line = ""
    """What happens before the next step, for people: shown until that step."""


class Outcome(Record, extra="forbid"):
    """How a training ended. The command line should exit with `exit_status` and `error`."""

    status: Status
    """`paused`: at the end of `Job.until_epoch`, with a checkpoint. `interrupted`: the ranks agreed to stop; `steps` is
    the step of the last checkpoint. `diverged`: a loss or gradient was not finite. `unsaved`: no checkpoint could be
    stored for `checkpoints.patience`. `crashed`: unexpected error, perhaps only because another rank died."""

    error: Line = ""
    exit_status: int = 0
    resumable: bool = Field(False, exclude_if=operator.not_)
    """Whether an outage ended it, so that it may go on later. Left out if not, for older readers."""

    weights_key: str = ""
    weights_sha256: str = ""
    steps: int = 0
    world_size: int = 0
    """Number of ranks at their last start."""

    train_seconds: float = 0.0
    rank_seconds: float = 0.0
    """Of all starts of the ranks: the seconds of each, multiplied by its number of ranks."""

    images_per_second: float = 0.0
    utilisation: Utilisation | None = Field(None, exclude_if=operator.not_)
    """Of the last start of the ranks."""

    val_accuracy: float = 0.0
    val_loss: float = 0.0
    metrics: tuple[dict[str, Any], ...] = ()
    """Rows (`MetricRow`) of a finished or paused training that the tracking server had not acknowledged; the flow sends
    them."""


@contextmanager
def spare_outcome() -> Iterator[None]:
    """Gives the processes that this one starts in the block a file in memory for an outcome that no disk can take.

    The file lives until this process ends: only this process waits for the outcome.
    """
    with memory_file() as path:
        os.environ[SPARE_OUTCOME] = str(path)
        try:
            yield
        finally:
            os.environ.pop(SPARE_OUTCOME, None)


def print_line(message: str) -> None:
    """Prints a line to the log, unless its disk is full."""
    with suppress(OSError):
        print(message, file=sys.stderr, flush=True)


class Restarts:
    """Counts restarts of the ranks: `Job.restarts` are allowed in a row without a further step."""

    def __init__(self, folder: "JobFolder") -> None:
        self._folder, self._allowed = folder, folder.read_job().restarts
        self._left, self._step = self._allowed, folder.last_step()

    def take(self) -> bool:
        """Uses up one restart; returns False if none was left."""
        if (step := self._folder.last_step()) > self._step:
            self._step, self._left = step, self._allowed
        self._left -= 1
        return self._left >= 0


class JobFolder:
    """The folder of one training, `<home>/runs/<MLflow run id>`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.log = path / "train.log"
        self.weights = path / "model.safetensors"
        self.trace = path / "trace.json.gz"
        self._events_read = 0

    def write_job(self, job: Job) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "events.jsonl").unlink(missing_ok=True)
        self._forget_outcome()
        (self.path / "job.json").write_text(job.model_dump_json())

    def read_job(self) -> Job:
        return Job.model_validate_json((self.path / "job.json").read_bytes())

    def mark_stopped(self) -> None:
        """Records that the ranks have reached the agreed step of a stop, and that its checkpoint is being stored."""
        with suppress(OSError):  # a full disk cannot hold the checkpoint either
            (self.path / "stopped").touch()

    @property
    def stopped(self) -> bool:
        """Whether the ranks of this start have reached the agreed step of a stop."""
        return (self.path / "stopped").exists()

    def write_event(self, event: Event) -> None:
        """Appends an event; drops it if the disk is full, since that is no reason to end a training."""
        with suppress(OSError), (self.path / "events.jsonl").open("ab", buffering=0) as file:
            file.write(event.model_dump_json().encode() + b"\n")

    def new_events(self) -> Iterator[Event]:
        """Yields the events that this object has not read yet, without a line that is still being written."""
        try:
            with (self.path / "events.jsonl").open("rb") as file:
                file.seek(self._events_read)
                written = file.read()
        except FileNotFoundError:
            return
        whole = written[: written.rfind(b"\n") + 1]
        self._events_read += len(whole)
        for line in whole.splitlines():
            with suppress(ValidationError):  # a disk that was full for a while may have cut a line
                yield Event.model_validate_json(line)

    def last_step(self) -> int:
        """Returns the highest step that any start of the ranks has reported; 0 before the first report."""
        return max((event.step for event in JobFolder(self.path).new_events() if not event.waiting), default=0)

    def start_again(self) -> None:
        """Prepares another start of the ranks: deletes the outcome and renames the log."""
        self._forget_outcome()
        number = len(list(self.path.glob("train.log.*"))) + 1
        if self.log.exists():
            self.log.rename(self.path / f"train.log.{number}")

    def write_outcome(self, outcome: Outcome) -> None:
        """Writes the outcome, unless there is one: the first rank knows the cause, the others fail because of it.

        If the disk is full, writes to the memory of the flow or agent (`spare_outcome`).
        """
        temporary, line = self.path / f".outcome.{os.getpid()}", outcome.model_dump_json()
        try:
            temporary.write_text(line)
            os.link(temporary, self.path / "outcome.json")  # fails if the file exists, unlike a rename
        except FileExistsError:
            pass
        except OSError as error:
            print_line(f"the outcome could not be written ({error.strerror}): {line}")
            with (
                suppress(KeyError, FileNotFoundError),
                Path(os.environ[SPARE_OUTCOME]).open("ab", buffering=0) as spare,
            ):
                spare.write(f"{self.path} {line}\n".encode())
        finally:
            temporary.unlink(missing_ok=True)

    def read_outcome(self) -> Outcome | None:
        """Returns the outcome; None if no rank wrote one."""
        try:
            return Outcome.model_validate_json((self.path / "outcome.json").read_bytes())
        except FileNotFoundError:
            prefix = f"{self.path} "
            with suppress(KeyError, FileNotFoundError):  # the file in memory ends with the flow
                for line in Path(os.environ[SPARE_OUTCOME]).read_text().splitlines():
                    if line.startswith(prefix):
                        return Outcome.model_validate_json(line.removeprefix(prefix))
            return None

    def killed(self) -> str | None:
        """Returns which rank was killed by which signal, for people; None if torchrun has reported none."""
        log = self._log()
        found = KILLED_FIRST.search(log) or TERMINATED.search(log)
        return f"rank {found[1]} was killed by {found[2]}" if found else None

    def log_end(self, lines: int = 3) -> str:
        """Returns the last lines that ranks or torchrun printed, joined to one line."""
        printed = [line for line in self._log().splitlines() if line.strip()]
        return " | ".join(printed[-lines:]) or "they were killed"

    def _forget_outcome(self) -> None:
        for name in ("outcome.json", "stopped"):
            (self.path / name).unlink(missing_ok=True)
        with suppress(KeyError, FileNotFoundError):
            os.truncate(os.environ[SPARE_OUTCOME], 0)

    def _log(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""
