"""Starts torchrun, which starts one rank per device of this machine, wherever the other ranks are.

    python -m tasks.training.torchrun OPTIONS...      (started by `start_torchrun`; the options are torchrun's)

Its agents meet by torchrun's static rendezvous, since each start has a fixed set of nodes. The dynamic one (c10d)
unpickles what it finds in the store that its agents share. The agent of a single machine meets no other: its store is
in its own memory, so it neither listens on a port nor writes to a disk that may be full.

It forks the ranks (tasks/training/forked_ranks.py).
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infra.machine.lifeline import TORCHRUN_PID, dying_with_this_process
from tasks.training.protocol.patience import TORCHRUN

KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
"""The C library is to keep freed memory: else each step gives its largest blocks back, and page faults fetch them."""

JOINS_WITHIN = 60  # seconds that the agents of all nodes have to meet

ALONE = ("--nnodes", "1", "--rdzv-backend", "alone", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1")
"""torchrun's options for a training on this machine; without an endpoint, which nobody uses, torchrun would warn."""


def among_nodes(generation: str, meeting: str, number: int, nodes: int, address: str) -> Sequence[str]:
    """Returns torchrun's options for one of several nodes.

    Args:
        generation: id of this start of the ranks.
        meeting: address and port of node 0, where the agents meet.
        number: of this node, from 0.
        nodes: how many there are.
        address: of this node.
    """
    options = ["--rdzv-backend", "static", "--rdzv-endpoint", meeting, "--rdzv-conf", f"timeout={JOINS_WITHIN}"]
    return [
        *("--nnodes", str(nodes), "--node-rank", str(number), "--local-addr", address, "--rdzv-id", generation),
        *options,
    ]


def start_torchrun(
    folder: Path, *, ranks: int, meeting: Sequence[str], ranks_meet: Path | None = None, interface: str, log: int
) -> subprocess.Popen[bytes]:
    """Starts torchrun as a child that dies with this process; it does not restart ranks, its owner does.

    Args:
        folder: of the job (`tasks/training/protocol/job.py`).
        ranks: of this machine.
        meeting: torchrun's options that say how its agents find each other: `ALONE` or `among_nodes(...)`.
        ranks_meet: file in which the ranks find each other; None for the TCP store that torchrun's agents meet at.
        interface: name of the network interface that the ranks talk over.
        log: file descriptor for what torchrun and the ranks print.
    """
    command = [sys.executable, "-m", "tasks.training.torchrun", "--nproc-per-node", str(ranks), "--max-restarts", "0"]
    command += ["--shutdown-timeout", f"{TORCHRUN:.0f}"]
    command += ["--log-dir", str(folder / "torchrun")]  # else it leaves a folder in the temporary one at each start
    command += [*meeting, "-m", "tasks.training.rank", str(folder), *([str(ranks_meet)] if ranks_meet else [])]
    environment = (
        KEEP_MEMORY
        | os.environ
        | {
            "PYTHONSAFEPATH": "1",  # else `-m` looks for our modules in the user's folder first
            "GLOO_SOCKET_IFNAME": interface,
            "NCCL_SOCKET_IFNAME": interface,
            "OMP_NUM_THREADS": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "torchrun"),  # else in the temporary folder, too
        }
    )
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=dying_with_this_process(),
    )


def main() -> None:
    import torch.distributed as dist
    from torch.distributed import run
    from torch.distributed.elastic.rendezvous import (
        RendezvousInfo,
        RendezvousParameters,
        RendezvousStoreInfo,
        rendezvous_handler_registry,
    )
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

    from tasks.training.forked_ranks import fork_ranks

    class Alone(StaticTCPRendezvous):
        def get_backend(self) -> str:
            return "alone"

        def next_rendezvous(self) -> RendezvousInfo:
            return RendezvousInfo(dist.HashStore(), 0, 1, RendezvousStoreInfo("127.0.0.1", 0))

    def alone(parameters: RendezvousParameters) -> Any:
        return Alone("127.0.0.1", 0, 0, 1, parameters.run_id, 0)

    rendezvous_handler_registry.register("alone", alone)
    fork_ranks()
    os.environ[TORCHRUN_PID] = str(os.getpid())
    run.main(sys.argv[1:])


if __name__ == "__main__":
    main()
