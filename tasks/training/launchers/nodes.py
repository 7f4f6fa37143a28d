"""Launcher for nodes that join by `convoy join`; this machine can be one of them."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from infra.machine.lifeline import dying_with_this_process
from tasks.training.protocol.job import JobFolder


@contextmanager
def agents(folder: JobFolder) -> Iterator[None]:
    """Runs an agent on this machine, unless it only coordinates; the agent dies with this process."""
    job = folder.read_job()
    if job.launch.nodes.here:
        with (folder.path / "agent.log").open("wb") as log:
            subprocess.Popen(
                [sys.executable, "-m", "tasks.training.nodes.agent", job.run_id],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=dying_with_this_process(),
            )
    yield
