"""Has torchrun fork its ranks, rather than start each as a program that loads PyTorch by itself, which takes seconds.

torchrun has a single thread when it forks, no device was touched, and neither MLflow nor Prefect was loaded. torchrun's
own way to fork (`--start-method fork`) is not used: such ranks wait at their end until torchrun has read what they
return, and a torchrun that was told to stop reads no more.
"""

import os
import signal
import sys
from multiprocessing.context import ForkProcess
from typing import Any

import torch._dynamo  # noqa: F401 (the optimizer and DDP load it)
from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from infra.machine.output import outlive_readers
from tasks.training import rank

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # that torchrun handles


def fork_ranks() -> None:
    """Has torchrun, in this process, fork the ranks that it is told to start."""
    vars(api)["get_subprocess_handler"] = _ForkedHandler


class _Rank(ForkProcess):
    """A forked rank with what torchrun uses of `subprocess.Popen`."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        super().__init__()
        self._arguments, self._environment = arguments, environment
        held_back = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # the rank is not to run torchrun's handlers
        try:
            self.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held_back)
        assert self.pid
        self._lead_group(self.pid)

    def run(self) -> None:
        """Is the rank; what torchrun has set for itself does not count here."""
        self._lead_group(0)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        os.environ.update(self._environment)
        sys.argv[1:] = self._arguments
        with outlive_readers("stdout", "stderr"):  # a disk without room for the log
            sys.exit(rank.main())

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self.join(timeout)
        return self.exitcode

    @staticmethod
    def _lead_group(process: int) -> None:
        """Gives a rank the group by which torchrun signals it; both do so, since neither waits for the other."""
        os.setpgid(process, process)


class _ForkedHandler(SubprocessHandler):
    def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> Any:
        return _Rank(list(args[args.index("-m") + 2 :]), env)
