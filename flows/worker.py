"""The process of `convoy worker`: Prefect's process worker, which outlives outages and looks after dead trainings.

python -m flows.worker POOL LIMIT QUEUE …
"""

import asyncio
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import httpx
import psutil
from prefect.client.schemas.objects import FlowRun
from prefect.workers.process import ProcessWorker

from flows.at_commit import FLOW_RUN_VARIABLE
from flows.resumption import Sweep
from infra.machine.output import outlive_readers
from infra.machine.stopping import SAME_PRESS_SECONDS
from infra.settings import Settings
from tasks.orchestration.outage import is_prefect_outage
from tasks.training.protocol.patience import WORKER_WAIT

POLL_SECONDS = 0.2


class Worker(ProcessWorker):
    """Prefect's worker, which outlives outages, and at its end lets its flow runs end themselves.

    Prefect's own would end after some minutes without Prefect, and at its end it sends SIGKILL to its flow runs.
    """

    _down = False
    _ending = False

    @classmethod
    def __dispatch_key__(cls) -> str:
        return "convoy"  # of its own in Prefect's table of classes, which would warn that ProcessWorker is replaced

    async def run_until_signal(self) -> None:
        """Runs until SIGTERM or Ctrl-C, then ends the flow runs; a second signal ends all of it immediately."""
        loop, told, again = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        for each in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(each) != signal.SIG_IGN:  # as SIGINT is for a script's background job
                loop.add_signal_handler(each, lambda: again.set() if told.is_set() else told.set())
        work = asyncio.create_task(self.start(printer=print_line))
        for stage in (told.wait, partial(self._end_flow_runs, again)):
            step = asyncio.create_task(stage())
            await asyncio.wait({work, step}, return_when=asyncio.FIRST_COMPLETED)
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(each)  # a further signal ends this process, if Prefect's end of it hangs
        work.cancel()
        with suppress(asyncio.CancelledError):
            await work

    async def _end_flow_runs(self, at_once: asyncio.Event) -> None:
        """Takes no more flow runs, asks those that run to end, and waits for that, for `WORKER_WAIT` at most."""
        self._ending = True
        await asyncio.sleep(SAME_PRESS_SECONDS)
        at_once.clear()
        asked, deadline = set[psutil.Process](), time.monotonic() + WORKER_WAIT
        if self._limiter and self._limiter.borrowed_tokens:
            print_line("ending: trainings store a checkpoint and end; a second signal kills them")
        while self._limiter and self._limiter.borrowed_tokens and time.monotonic() < deadline and not at_once.is_set():
            for process in set(psutil.Process().children()) - asked:
                with suppress(psutil.Error):
                    if FLOW_RUN_VARIABLE in process.environ():  # not yet before `exec`; and not a process of the sweep
                        process.terminate()
                        asked.add(process)
            await asyncio.sleep(POLL_SECONDS)

    async def get_and_submit_flow_runs(self) -> list[FlowRun]:
        if not self._ending:
            with self._outliving_outages():
                return await super().get_and_submit_flow_runs()
        return []

    async def sync_with_backend(self) -> None:
        with self._outliving_outages():
            await super().sync_with_backend()

    @contextmanager
    def _outliving_outages(self) -> Iterator[None]:
        """Reports an outage of Prefect once; the worker's next round tries again."""
        try:
            yield
            self._down = False
        except httpx.HTTPError as error:
            if not is_prefect_outage(error):
                raise
            if not self._down:
                print_line(f"Prefect does not answer, which ends no flow run: trying again ({error})")
            self._down = True


def print_line(line: str) -> None:
    """Prints a line of Convoy into the worker's log."""
    print(f"convoy: {line}", flush=True)


@outlive_readers("stdout", "stderr")  # the log's reader gets Ctrl-C too
def main() -> None:
    """Runs the worker until a signal ends it."""
    pool, limit, *queues = sys.argv[1:]
    # For the command of flow runs with the code of a commit, see `flows.at_commit`.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    sweep, pause = Sweep(pool, queues[0], print_line), Settings().sweep_seconds
    threading.Thread(target=sweep.for_ever, args=(pause,), name="sweep", daemon=True).start()
    worker = Worker(
        name=f"{socket.gethostname()} {os.getpid()}",
        work_pool_name=pool,
        work_queues=queues,
        limit=int(limit),
        create_pool_if_not_found=False,
    )
    asyncio.run(worker.run_until_signal())


if __name__ == "__main__":
    main()
