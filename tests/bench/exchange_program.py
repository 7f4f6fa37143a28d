"""A rank that sums vectors with all others, in turns by our exchange and by torch's all_reduce: exchange_program.py.

    ... -m tests.bench.exchange_program ROUNDS ELEMENTS...

The first rank prints a JSON line for each number of elements: {"ours": [seconds of each round], "theirs": [...]}.
"""

import json
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from cnn.distributed.process_group import make_deterministic, process_group

LEAST = 0.3  # seconds that a round takes at least


def main() -> None:
    rounds, *sizes = map(int, sys.argv[1:])
    make_deterministic()
    with process_group() as (device, exchange):
        group = dist.new_group()
        for size in sizes:
            vector = torch.zeros(size, device=device)
            sides: dict[str, Callable[[], object]] = {
                "ours": lambda vector=vector: exchange.submit(vector).wait(),  # type: ignore[misc]
                "theirs": lambda vector=vector: dist.all_reduce(vector, group=group),  # type: ignore[misc]
            }
            repeats = torch.tensor([max(1, round(LEAST / timed(sides["ours"], 2)))])
            dist.broadcast(repeats, src=0)
            figures: dict[str, list[float]] = {name: [] for name in sides}
            for number in range(rounds):
                for name in sorted(sides, reverse=bool(number % 2)):
                    figures[name].append(timed(sides[name], int(repeats)))
            if exchange.rank == 0:
                print(json.dumps(figures), flush=True)
            dist.barrier()


def timed(work: Callable[[], object], repeats: int) -> float:
    """Seconds of one call, when all ranks begin together."""
    dist.barrier()
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - began) / repeats


if __name__ == "__main__":
    main()
