"""The process of `convoy worker`: Prefect's process worker, which outlives outages and looks after dead trainings.

python -m flows.worker POOL LIMIT QUEUE …
"""

import asyncio
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
from prefect.client.schemas.objects import FlowRun
from prefect.utilities.processutils import setup_signal_handlers_worker
from prefect.workers.process import ProcessWorker

from flows.resumption import Sweep
from infra.settings import Settings
from tasks.orchestration.outage import is_prefect_outage


class Worker(ProcessWorker):
    """Prefect's worker, which would end, and its flow runs with it, after some minutes without Prefect."""

    _down = False

    @classmethod
    def __dispatch_key__(cls) -> str:
        return "convoy"  # of its own in Prefect's table of classes, which would warn that ProcessWorker is replaced

    async def get_and_submit_flow_runs(self) -> list[FlowRun]:
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


def main() -> None:
    """Runs the worker until a signal ends it: first it takes no more flow runs, then its flow runs end themselves."""
    pool, limit, *queues = sys.argv[1:]
    # For the command of flow runs with the code of a commit, see `flows.at_commit`.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    setup_signal_handlers_worker(os.getpid(), "the worker", print_line)
    sweep, pause = Sweep(pool, queues[0], print_line), Settings().sweep_seconds
    threading.Thread(target=sweep.for_ever, args=(pause,), name="sweep", daemon=True).start()
    worker = Worker(
        name=f"{socket.gethostname()} {os.getpid()}",
        work_pool_name=pool,
        work_queues=queues,
        limit=int(limit),
        create_pool_if_not_found=False,
    )
    with suppress(KeyboardInterrupt, asyncio.CancelledError):
        asyncio.run(worker.start(printer=print_line))


if __name__ == "__main__":
    main()
