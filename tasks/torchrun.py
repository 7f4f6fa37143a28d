"""Starting torchrun, which starts one rank a device on this machine; alike wherever the other ranks are."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tasks.lifeline import SUPERVISOR_PID, die_with_parent

KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
"""The C library is to keep freed memory: else each step gives its largest blocks back, and page faults fetch them."""


def start_torchrun(
    folder: Path, *, ranks: int, meeting: Sequence[str], ranks_meet: Path | None = None, interface: str, log: int
) -> subprocess.Popen[bytes]:
    """Start torchrun as a child that dies with this process; it does not restart ranks, its owner does.

    Args:
        folder: of the job (`tasks/job.py`).
        ranks: of this machine.
        meeting: torchrun's options that say how its agents find each other.
        ranks_meet: file in which the ranks find each other; None for the TCP store that torchrun's agents meet at.
        interface: name of the network interface that the ranks talk over.
        log: file descriptor for what torchrun and the ranks print.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--max-restarts", "0"]
    command += [*meeting, "-m", "tasks.rank", str(folder), *([str(ranks_meet)] if ranks_meet else [])]
    environment = (
        KEEP_MEMORY
        | os.environ
        | {
            "PYTHONSAFEPATH": "1",  # else `-m` looks for our modules in the user's folder first
            "GLOO_SOCKET_IFNAME": interface,
            "NCCL_SOCKET_IFNAME": interface,
            "OMP_NUM_THREADS": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": str(int(ranks_meet is not None)),
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
