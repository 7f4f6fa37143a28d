"""What the train task and the processes of a training tell each other, as files in the training's own folder.

job.json             the task's order
events.jsonl         rank 0's account of how it goes, a line at a time
train.log            what the ranks and torchrun print; train.log.1 … of earlier starts
model.safetensors    the final weights
stopped              there since the ranks have come to a stop and store its checkpoint
outcome.json         how it ended, by the first rank that had something to say
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ValidationError

from cnn.config.training import TrainConfig
from infra.errors import one_line
from infra.records import Record
from tasks.config.launchers import AnyLaunch, Launch
from tasks.config.run import CheckpointConfig
from tasks.training.protocol.memory_file import memory_file

SPARE_OUTCOME = "CONVOY_SPARE_OUTCOME"  # path of the memory file of `spare_outcome`

Status = Literal["finished", "interrupted", "failed", "unsaved", "crashed"]

Line = Annotated[str, AfterValidator(one_line)]
"""Text for people, made one line: libraries' errors, PyTorch's above all, have several."""

KILLED = r"rank +: (\d+) .*\n *exitcode +: -\d+ \(pid: \d+\) +\((%s)\)"
"""How torchrun says that a rank ended by a signal."""

KILLED_FIRST = re.compile(KILLED % r"(?!SIGTERM)SIG\w+")
TERMINATED = re.compile(r"Root Cause.*\n.*\n.*\n.*\n *" + KILLED % "SIGTERM")  # torchrun then sends it to the others


class Job(Record, extra="forbid"):
    """An order to train."""

    run_id: str
    config: TrainConfig
    dataset_version: str
    world_size: int
    """Of a training on this machine; on several nodes, the largest there may be."""

    launch: AnyLaunch = Launch()
    manifest_digest: str
    checkpoints: CheckpointConfig
    restarts: int


class Event(Record, extra="forbid"):
    """Where the training is: after `step` of `total_steps` steps, in `epoch`, both counted from 1; or a warning."""

    step: int = 0
    total_steps: int = 0
    epoch: int = 0
    loss: float | None = None
    images_per_second: float | None = None
    val_accuracy: float | None = None
    warning: Line | None = None
    """Something that people should know of."""

    note: Line | None = None
    """What happens now."""


class Outcome(Record, extra="forbid"):
    """How a training ended. `exit_status` and `error` are those that the command line should end with."""

    status: Status
    """`interrupted`: the ranks agreed to stop; `steps` is that of the last checkpoint. `unsaved`: no checkpoint could
    be stored for `checkpoints.patience`. `crashed`: by an unforeseen error; perhaps only because another rank was
    gone."""

    error: Line = ""
    exit_status: int = 0
    weights_key: str = ""
    weights_sha256: str = ""
    steps: int = 0
    world_size: int = 0
    """Of the last start of the ranks."""

    train_seconds: float = 0.0
    images_per_second: float = 0.0
    val_accuracy: float = 0.0
    val_loss: float = 0.0
    metrics: tuple[dict[str, Any], ...] = ()
    """Rows (`MetricRow`) of a finished training that the tracking server had not acknowledged; the flow sends them."""


@contextmanager
def spare_outcome() -> Iterator[None]:
    """Gives the processes that this one starts in the block a place in memory for the outcome, should no disk take it.

    It lives as long as this process, which alone waits for the outcome.
    """
    with memory_file() as place:
        os.environ[SPARE_OUTCOME] = str(place)
        try:
            yield
        finally:
            os.environ.pop(SPARE_OUTCOME, None)


def say(message: str) -> None:
    """Prints a line for the log, if that can be written."""
    try:
        print(message, file=sys.stderr, flush=True)
    except OSError:
        pass


class Restarts:
    """Counts how often ranks may be started again: as often as the job says, without a step forward in between.

    Args:
        folder: of the job.
    """

    def __init__(self, folder: "JobFolder") -> None:
        self._folder, self._allowed = folder, folder.read_job().restarts
        self._left, self._step = self._allowed, folder.last_step()

    def take(self) -> bool:
        """Uses up one of them; False if none is left."""
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
        self._events_read = 0

    def write_job(self, job: Job) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "events.jsonl").unlink(missing_ok=True)
        self._forget_outcome()
        (self.path / "job.json").write_text(job.model_dump_json())

    def read_job(self) -> Job:
        return Job.model_validate_json((self.path / "job.json").read_bytes())

    def mark_stopped(self) -> None:
        """Says that the ranks have come to a stop, and that its checkpoint is being stored."""
        with suppress(OSError):  # a full disk takes no checkpoint either
            (self.path / "stopped").touch()

    @property
    def stopped(self) -> bool:
        """Whether the ranks of this start have come to a stop."""
        return (self.path / "stopped").exists()

    def write_event(self, event: Event) -> None:
        """Appends a line; on a full disk it is dropped, since a missing event is no reason to end a training."""
        try:
            with (self.path / "events.jsonl").open("ab", buffering=0) as file:
                file.write(event.model_dump_json().encode() + b"\n")
        except OSError:
            pass

    def new_events(self) -> Iterator[Event]:
        """Yields events that were not read before by this object; a line that is still being written waits.

        Lines that a full disk has cut are left out.
        """
        try:
            with (self.path / "events.jsonl").open("rb") as file:
                file.seek(self._events_read)
                written = file.read()
        except FileNotFoundError:
            return
        whole = written[: written.rfind(b"\n") + 1]
        self._events_read += len(whole)
        for line in whole.splitlines():
            with suppress(ValidationError):  # of a disk that was full for a while a part of a line may be left
                yield Event.model_validate_json(line)

    def last_step(self) -> int:
        """How far any start of the ranks has come, as far as it is reported; 0 before the first report."""
        return max((event.step for event in JobFolder(self.path).new_events()), default=0)

    def start_again(self) -> None:
        """Make room for another start of the ranks: forget the outcome, and set the log aside."""
        self._forget_outcome()
        number = len(list(self.path.glob("train.log.*"))) + 1
        if self.log.exists():
            self.log.rename(self.path / f"train.log.{number}")

    def write_outcome(self, outcome: Outcome) -> None:
        """Leaves how it ended; the first to say so is right, since the others fail because of it.

        On a full disk it is left in the memory of the flow or agent (`spare_outcome`).
        """
        temporary, line = self.path / f".outcome.{os.getpid()}", outcome.model_dump_json()
        try:
            temporary.write_text(line)
            os.link(temporary, self.path / "outcome.json")  # unlike a rename, fails if there is one
        except FileExistsError:
            pass
        except OSError as error:
            say(f"the outcome could not be written ({error.strerror}): {line}")
            with (
                suppress(KeyError, FileNotFoundError),
                Path(os.environ[SPARE_OUTCOME]).open("ab", buffering=0) as spare,
            ):
                spare.write(f"{self.path} {line}\n".encode())
        finally:
            temporary.unlink(missing_ok=True)

    def read_outcome(self) -> Outcome | None:
        """Returns how it ended; None if no rank lived to say so."""
        try:
            return Outcome.model_validate_json((self.path / "outcome.json").read_bytes())
        except FileNotFoundError:
            lines: list[str] = []
            with suppress(KeyError, FileNotFoundError):  # there is none any more once the flow has gone
                lines = Path(os.environ[SPARE_OUTCOME]).read_text().splitlines()
            ours = (line.removeprefix(f"{self.path} ") for line in lines if line.startswith(f"{self.path} "))
            first = next(ours, None)
            return Outcome.model_validate_json(first) if first else None

    def killed(self) -> str | None:
        """Which rank was ended by which signal, if torchrun lived to see it."""
        log = self._log()
        found = KILLED_FIRST.search(log) or TERMINATED.search(log)
        return f"rank {found[1]} was killed by {found[2]}" if found else None

    def log_end(self, lines: int = 3) -> str:
        """The last lines that ranks or torchrun printed, as one line."""
        said = [line for line in self._log().splitlines() if line.strip()]
        return " | ".join(said[-lines:]) or "they were killed"

    def _forget_outcome(self) -> None:
        for name in ("outcome.json", "stopped"):
            (self.path / name).unlink(missing_ok=True)
        with suppress(KeyError, FileNotFoundError):
            os.truncate(os.environ[SPARE_OUTCOME], 0)

    def _log(self) -> str:
        try:
            return self.log.read_text(errors="replace")
        except FileNotFoundError:
            return ""
