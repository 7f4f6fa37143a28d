"""Trainings that take turns: each lives on in ranks of its own, and does a round whenever it is told to.

So every side keeps its warm processes, its loaders' workers among them, and starting them costs no measured time.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from cnn.config.training import TrainConfig
from infra.stack.processes import log_end
from tests.bench.comparison import Side

LEAD = 6  # steps of a turn that come first and are not timed: workers have filled their queues while they waited
PATIENCE = 120.0  # seconds for ranks to start, or to do a round
END_PATIENCE = 20.0  # seconds for ranks to end in good order
ADDRESS = "CONVOY_BENCH_TURNS"
GO, STOP = b"+", b"-"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What ranks train, and how."""

    program: str
    """A name of `rank_program.PROGRAMS`."""

    model: str = "convoy9"
    ranks: int = 2
    threads: int = 1
    """Of each rank."""

    workers: int = 0
    """Processes of each rank's DataLoader."""

    steps: int = 12
    """Timed ones in a round."""

    starts_ranks: bool = False
    """Whether the program, started once, starts the other ranks itself."""

    @property
    def config(self) -> TrainConfig:
        """Everything else is as in Convoy's default recipe."""
        return TrainConfig(model=self.model)


class Turns:
    """In a rank: lets its training through a round at a time. It waits for the first turn when it is made."""

    def __init__(self, steps: int) -> None:
        self._steps, self._step, self._began = steps, 0, 0.0
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(os.environ[ADDRESS])
        self._wait()

    def step_done(self) -> bool:
        """Call it after each step; when a round is over it waits for the next turn. False: there is none, stop."""
        self._step += 1
        if self._step == LEAD:
            self._began = time.perf_counter()
        if self._step < LEAD + self._steps:
            return True
        self._socket.sendall(json.dumps(time.perf_counter() - self._began).encode() + b"\n")
        self._step = 0
        return self._wait()

    def _wait(self) -> bool:
        word = self._socket.recv(1)
        if not word:  # the benchmark is gone
            os._exit(1)
        return word == GO


@contextmanager
def ranks(label: str, job: Job, folder: Path) -> Iterator[Side]:
    """Ranks that train on the packed images in `folder` (see `data`), started and ready; a figure is images/s.

    Raises:
        RuntimeError: a rank ended, or did not answer in time; with the end of what it said.
    """
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(place / "turns"))
        listener.listen()
        listener.settimeout(0.5)
        with (place / "log").open("wb") as log:
            started = range(1 if job.starts_ranks else job.ranks)
            processes = [_start(rank, job, folder, place, log.fileno()) for rank in started]
        stack.callback(_end, processes)

        def failure() -> RuntimeError:
            return RuntimeError(f"{label}: {log_end(place / 'log')}")

        sockets: list[socket.socket] = []
        deadline = time.monotonic() + PATIENCE
        while len(sockets) < job.ranks:
            try:
                sockets.append(stack.enter_context(listener.accept()[0]))
            except TimeoutError:
                if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
                    raise failure() from None
        answers = []
        for each in sockets:
            each.settimeout(PATIENCE)
            answers.append(stack.enter_context(each.makefile("r")))

        def measure() -> float:
            try:
                for each in sockets:
                    each.sendall(GO)
                seconds = [float(answer.readline()) for answer in answers]
            except (OSError, ValueError):
                raise failure() from None
            return job.config.batch_size * job.steps / max(seconds)

        yield Side(label, measure)
        for each in sockets:
            with suppress(OSError):
                each.sendall(STOP)
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_PATIENCE)


def _start(rank: int, job: Job, folder: Path, place: Path, log: int) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        ADDRESS: str(place / "turns"),
        "OMP_NUM_THREADS": str(job.threads),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [sys.executable, "-m", "tests.bench.rank_program", str(folder), json.dumps(asdict(job))]
    if not job.starts_ranks:
        environment |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))  # as torchrun does
        environment |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(job.ranks))
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.kill()  # those that did not end by themselves; their children follow, see `rank_program`
        process.wait()
