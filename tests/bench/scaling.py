"""What an exchange of gradients costs over a network: ranks in network namespaces with limited bandwidth."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from cnn.config.training import TrainConfig
from cnn.networks.build import build_network
from infra.stack.processes import log_end
from tests.bench.comparison import Comparison, LeftOut
from tests.faults.network import network, why_not

WORLD_SIZES = (2, 4, 8)
NETWORKS = {"notes": (1, 28, 10), "convoy9": (1, 28, 10), "resnet18": (3, 64, 10)}  # channels, size, classes
MEGABITS = {100: ("notes", "convoy9"), 1000: ("notes", "convoy9", "resnet18")}
"""Bandwidth of each host, both ways, and the networks whose gradients are summed then."""

PORT = 29_500
PATIENCE = 300.0


def exchange(rounds: int) -> Iterator[Comparison]:
    """Summing a network's gradients over 2, 4 and 8 hosts, against all_reduce, whose bits depend on their number.

    The figures are bits of gradients that are summed per second.
    """
    if reason := why_not():
        raise LeftOut(reason)
    for megabits, names in MEGABITS.items():
        sizes = [parameters(name) for name in names]
        for world_size in WORLD_SIZES:
            for name, size, figures in zip(names, sizes, _measure(world_size, megabits, sizes, rounds), strict=True):
                ours, theirs = (
                    tuple(size * 32 / seconds / 1e6 for seconds in figures[side]) for side in ("ours", "theirs")
                )
                yield Comparison(
                    name=f"{name}, {size * 4 / 2**20:.1f} MiB, {world_size} hosts, {megabits} Mbit/s",
                    ours_label="exchange",
                    theirs_label="all_reduce",
                    unit="Mbit/s",
                    ours=ours,
                    theirs=theirs,
                )


def parameters(name: str) -> int:
    """How many parameters a network has, on images of the size that it is here for."""
    channels, size, classes = NETWORKS[name]
    with torch.device("meta"):
        network = build_network(TrainConfig(model=name), channels=channels, image_size=size, classes=classes)
    return sum(parameter.numel() for parameter in network.parameters())


def _measure(world_size: int, megabits: int, sizes: list[int], rounds: int) -> list[dict[str, list[float]]]:
    burst = max(64, megabits * 4)  # kilobytes: what a timer tick lets through, and the largest packet
    with network(world_size, []) as hosts, TemporaryDirectory() as folder:
        started = []
        for rank, host in enumerate(hosts):
            host.shape("tbf", "rate", f"{megabits}mbit", "burst", f"{burst}kb", "latency", "100ms")
            environment = os.environ | {
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)},
                **{"MASTER_ADDR": hosts[0].address, "MASTER_PORT": str(PORT)},
                **{"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"},
            }
            command = [sys.executable, "-m", "tests.bench.exchange_program", str(rounds), *map(str, sizes)]
            log = Path(folder, f"rank{rank}")
            started.append(host.start(command, folder=Path.cwd(), log=log, environment=environment))
        if any([process.wait(PATIENCE) for process in started]):
            raise RuntimeError(f"a rank failed: {log_end(Path(folder, 'rank0'))}")
        lines = Path(folder, "rank0").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]
