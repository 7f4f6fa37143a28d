"""Ranks that sum vectors, and check each element against the tree: sum_program.py FOLDER WORLD_SIZE...

They are forked from this process, so that torch is loaded, and what is expected is computed, once.
"""

import multiprocessing
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from cnn.distributed.lanes import IN_FLIGHT_BYTES, SPLIT_BYTES
from cnn.distributed.process_group import process_group

SIZES = (1, SPLIT_BYTES // 4 - 1, SPLIT_BYTES // 4 + 1, IN_FLIGHT_BYTES, IN_FLIGHT_BYTES * 3 + 5)  # of four bytes each


def leaf(rank: int, size: int) -> Tensor:
    """Of magnitudes so different that every order of adding gives other bits."""
    random = torch.Generator().manual_seed(1000 * rank + size)
    return torch.randn(size, generator=random) * 10 ** torch.randint(-6, 6, (size,), generator=random)


def tree(sums: list[Tensor]) -> Tensor:
    """The sum of vectors along the balanced tree."""
    while len(sums) > 1:
        sums = [a + b for a, b in zip(sums[::2], sums[1::2], strict=True)]
    return sums[0]


def run_rank(meeting: Path, rank: int, leaves: list[list[Tensor]], expected: list[Tensor]) -> None:
    world_size = len(leaves[0])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    with process_group(dist.FileStore(str(meeting), world_size)) as (_, exchange):
        for each, total in zip(leaves, expected, strict=True):
            found = exchange.submit(each[rank].clone()).wait()
            assert torch.equal(found, total), f"{len(total)} elements at rank {rank} of {world_size}"


def main() -> None:
    fork = multiprocessing.get_context("fork")
    world_sizes = [int(word) for word in sys.argv[2:]]
    leaves = [[leaf(rank, size) for rank in range(max(world_sizes))] for size in SIZES]
    for world_size in world_sizes:
        chosen = [each[:world_size] for each in leaves]
        expected = [tree(each) for each in chosen]
        meeting = Path(sys.argv[1], f"meeting-{world_size}")
        ranks = [fork.Process(target=run_rank, args=(meeting, rank, chosen, expected)) for rank in range(world_size)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        assert [rank.exitcode for rank in ranks] == [0] * world_size


main()
