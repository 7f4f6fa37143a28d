"""Launcher for nodes that join by `convoy join`; this machine can be one of them."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from infra.machine.lifeline import dying_with_this_process
from tasks.training.launchers.watch import watching
from tasks.training.protocol.job import JobFolder


@contextmanager
def agents(folder: JobFolder) -> Iterator[None]:
    """Runs an agent on this machine, unless it only coordinates; again if it is killed. It dies with this process."""
    job, log_file = folder.read_job(), folder.path / "agent.log"
    if not job.launch.nodes.here:
        yield
        return

    def start() -> "subprocess.Popen[bytes]":
        with log_file.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "tasks.training.nodes.agent", job.run_id],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=dying_with_this_process(),
            )

    log_file.unlink(missing_ok=True)
    agent = start()

    def problems() -> Iterator[str]:
        nonlocal agent
        if status := agent.poll():
            said = log_file.read_text(errors="replace").strip().rpartition("\n")[2]
            yield f"the agent of this machine has ended with status {status}: {said}"
        if status is not None and status < 0:  # it was killed, for lack of memory say
            agent = start()

    with watching(problems, folder):
        yield
