"""Makes torchrun fork its ranks. By default, each rank is a new program, which takes seconds to load PyTorch.

When torchrun forks, it has a single thread, has used no device, and has loaded neither MLflow nor Prefect. Convoy does
not use torchrun's own `--start-method fork`: such ranks wait at their end until torchrun has read their result, and a
torchrun that was told to stop does not read it.
"""

import os
import signal
import sys
from contextlib import suppress
from multiprocessing.context import ForkProcess
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch._dynamo  # noqa: F401 (the optimizer and DDP load it)
from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from cnn.config.networks import find_network, is_own
from infra.machine.output import outlive_readers
from tasks.training import rank
from tasks.training.protocol.job import JobFolder

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # handled by torchrun


def load_network(folder: Path) -> None:
    """Imports what builds the network of a job: a library of networks takes seconds of each rank.

    Code of the user's, which may start threads or use a device, is left to the ranks.
    """
    model = JobFolder(folder).read_job().config.model
    if not is_own(model):
        with suppress(ImportError):  # the ranks report it
            resolve_name(find_network(model).builder)


def fork_ranks() -> None:
    """Makes torchrun, in this process, fork its ranks."""
    vars(api)["get_subprocess_handler"] = _ForkedHandler


class _Rank(ForkProcess):
    """A forked rank, with the part of the interface of `subprocess.Popen` that torchrun uses."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        super().__init__()
        self._arguments, self._environment = arguments, environment
        previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # the rank must not run torchrun's handlers
        try:
            self.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)
        assert self.pid
        self._lead_group(self.pid)

    def run(self) -> None:
        """Runs the rank, in the child, without torchrun's signal handlers."""
        self._lead_group(0)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        os.environ.update(self._environment)
        sys.argv[1:] = self._arguments
        with outlive_readers("stdout", "stderr"):  # the log's disk may be full
            sys.exit(rank.main())

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self.join(timeout)
        return self.exitcode

    @staticmethod
    def _lead_group(process: int) -> None:
        """Sets the process group by which torchrun signals a rank; parent and child both do so, since neither waits."""
        os.setpgid(process, process)


class _ForkedHandler(SubprocessHandler):
    def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> Any:
        return _Rank(list(args[args.index("-m") + 2 :]), env)
