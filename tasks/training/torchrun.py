"""Starts torchrun, which forks the ranks of this machine (tasks/training/forked_ranks.py).

    python -m tasks.training.torchrun OPTIONS...      (started by `start_torchrun`; the options are torchrun's)

torchrun's agents use its static rendezvous, since each start has a fixed set of nodes. The dynamic rendezvous (c10d)
unpickles what it finds in the agents' shared store. A training on one machine has a single agent: its store is in its
own memory, so it neither listens on a port nor writes to a disk that may be full.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infra.machine.lifeline import TORCHRUN_PID, dying_with_this_process
from tasks.training.protocol.patience import TORCHRUN_WAIT

KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
"""Makes the C library keep freed memory: else each step returns its largest blocks, and page faults fetch them."""

JOIN_TIMEOUT = 60  # seconds that the agents of all nodes have for their rendezvous

ALONE = ("--nnodes", "1", "--rdzv-backend", "alone", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1")
"""torchrun's options for a training on one machine. The endpoint is unused, but torchrun warns if it is missing."""


def node_options(generation: str, endpoint: str, number: int, nodes: int, address: str) -> Sequence[str]:
    """Returns torchrun's options for one of several nodes.

    Args:
        generation: id of this start of the ranks.
        endpoint: address and port of node 0 for the agents' rendezvous.
        number: of this node, from 0.
        nodes: number of nodes.
        address: of this node.
    """
    options = ["--rdzv-backend", "static", "--rdzv-endpoint", endpoint, "--rdzv-conf", f"timeout={JOIN_TIMEOUT}"]
    return [
        *("--nnodes", str(nodes), "--node-rank", str(number), "--local-addr", address, "--rdzv-id", generation),
        *options,
    ]


def start_torchrun(
    folder: Path, *, ranks: int, rendezvous: Sequence[str], rank_store: Path | None = None, interface: str, log: int
) -> subprocess.Popen[bytes]:
    """Starts torchrun as a child that dies with this process. It never restarts ranks: its owner does.

    Args:
        folder: of the job (`tasks/training/protocol/job.py`).
        ranks: number of ranks on this machine.
        rendezvous: torchrun's options for the rendezvous of its agents: `ALONE` or `node_options(...)`.
        rank_store: file for the ranks' rendezvous; None to use the TCP store of torchrun's agents.
        interface: network interface for the ranks' traffic.
        log: file descriptor for the output of torchrun and ranks.
    """
    command = [sys.executable, "-m", "tasks.training.torchrun", "--nproc-per-node", str(ranks), "--max-restarts", "0"]
    command += ["--shutdown-timeout", f"{TORCHRUN_WAIT:.0f}"]
    command += ["--log-dir", str(folder / "torchrun")]  # else each start leaves a temporary folder
    command += [*rendezvous, "-m", "tasks.training.rank", str(folder), *([str(rank_store)] if rank_store else [])]
    environment = (
        KEEP_MEMORY
        | os.environ
        | {
            "PYTHONSAFEPATH": "1",  # else `-m` searches the user's folder first
            "GLOO_SOCKET_IFNAME": interface,
            "NCCL_SOCKET_IFNAME": interface,
            "OMP_NUM_THREADS": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "torchrun"),  # else likewise
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

    from tasks.training.forked_ranks import fork_ranks, load_network
    from tasks.training.platform import loaded_code

    class Alone(StaticTCPRendezvous):
        def get_backend(self) -> str:
            return "alone"

        def next_rendezvous(self) -> RendezvousInfo:
            return RendezvousInfo(dist.HashStore(), 0, 1, RendezvousStoreInfo("127.0.0.1", 0))

    def alone(parameters: RendezvousParameters) -> Any:
        return Alone("127.0.0.1", 0, 0, 1, parameters.run_id, 0)

    rendezvous_handler_registry.register("alone", alone)
    load_network(Path(sys.argv[sys.argv.index("tasks.training.rank") + 1]))
    loaded_code()  # here, since the ranks are forked from this process
    fork_ranks()
    os.environ[TORCHRUN_PID] = str(os.getpid())
    run.main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the ranks have ended; the interpreter would take a second to take PyTorch's modules apart


if __name__ == "__main__":
    main()
