"""The program between the train task and torchrun: starts the ranks, and answers for none outliving the task.

    python -m tasks.supervisor FOLDER        (see tasks/job.py for the folder; started by tasks/train.py)

torchrun puts every rank into a session of its own, so no process group holds them all, and a killed torchrun leaves
its ranks running. So this program adopts orphans, and ends the whole tree below it when its standard input closes:
which the kernel does for the task, however the task ends. Should this program be killed, the kernel kills torchrun,
and the ranks with it (`tasks.lifeline.die_with_parent`).
"""

import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tasks.job import Event, JobFolder
from tasks.lifeline import SUPERVISOR_PID, adopt_orphans, die_with_parent, end_descendants

PATIENCE = 25.0  # seconds that ranks have to end by themselves: time for a last checkpoint
POLL = 0.2  # seconds
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
"""The C library is to keep freed memory: else each step gives its largest blocks back, and page faults fetch them."""


def main() -> int:
    folder = JobFolder(Path(sys.argv[1]))
    adopt_orphans()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return supervise(folder)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        end_descendants(PATIENCE)


def supervise(folder: JobFolder) -> int:
    """Start the ranks, and again after a crash, from their last checkpoint, until they say how it ended."""
    restarts_left = folder.read_job().restarts
    while True:
        step = folder.last_step()
        status = run_ranks(folder)
        outcome = folder.read_outcome()
        if status is None or (outcome and outcome.status != "crashed"):
            return status or 0
        if folder.last_step() > step:
            restarts_left = folder.read_job().restarts
        if not restarts_left:
            return status
        restarts_left -= 1
        end_descendants(PATIENCE)
        reason = folder.killed() or (outcome.error if outcome else folder.log_end())
        folder.write_event(Event(warning=f"{reason}; starting again from the last checkpoint"))
        folder.start_again()


def run_ranks(folder: JobFolder) -> int | None:
    """One start of torchrun; its exit status, or None if the task has ended, or wants us to end."""
    with tempfile.TemporaryDirectory(prefix="convoy-") as meeting, folder.log.open("wb") as log:
        torchrun = start_torchrun(folder, Path(meeting), log.fileno())
        while torchrun.poll() is None:
            readable, _, _ = select.select([sys.stdin], [], [], POLL)
            if readable and not os.read(sys.stdin.fileno(), 1):
                end_descendants(PATIENCE)  # now, while the ranks' meeting place is still there
                return None
        return torchrun.returncode


def start_torchrun(folder: JobFolder, meeting: Path, log: int) -> subprocess.Popen[bytes]:
    """Start torchrun with one rank a device on this machine.

    The processes meet in files and talk over the loopback interface: torchrun's usual TCP store would listen on
    every interface of the machine, without credentials.
    """
    job = folder.read_job()
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += ["--nnodes", "1", "--nproc-per-node", str(job.world_size), "--max-restarts", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-conf", "store_type=file", "--rdzv-endpoint", str(meeting / "agents")]
    command += ["--rdzv-id", job.run_id, "--local-addr", "127.0.0.1"]
    command += ["-m", "tasks.rank", str(folder.path), str(meeting / "ranks")]
    environment = (
        KEEP_MEMORY
        | os.environ
        | {
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "NCCL_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            SUPERVISOR_PID: str(os.getpid()),
        }
    )
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )


if __name__ == "__main__":
    sys.exit(main())
