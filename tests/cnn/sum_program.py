"""A rank that sums vectors with the others, and checks each element against the tree: sum_program.py MEETING."""

import os
import sys

import torch
import torch.distributed as dist

from cnn.distributed import process_group
from cnn.lanes import IN_FLIGHT_BYTES, SPLIT_BYTES

SIZES = (1, SPLIT_BYTES // 4 - 1, SPLIT_BYTES // 4 + 1, IN_FLIGHT_BYTES, IN_FLIGHT_BYTES * 3 + 5)  # of four bytes each


def leaf(rank: int, size: int) -> torch.Tensor:
    """Of magnitudes so different that every order of adding gives other bits."""
    random = torch.Generator().manual_seed(1000 * rank + size)
    return torch.randn(size, generator=random) * 10 ** torch.randint(-6, 6, (size,), generator=random)


def main() -> None:
    world_size = int(os.environ["WORLD_SIZE"])
    with process_group(dist.FileStore(sys.argv[1], world_size)) as (_, exchange):
        for size in SIZES:
            sums = [leaf(rank, size) for rank in range(world_size)]
            while len(sums) > 1:
                sums = [a + b for a, b in zip(sums[::2], sums[1::2], strict=True)]
            found = exchange.submit(leaf(exchange.rank, size)).wait()
            assert torch.equal(found, sums[0]), f"{size} elements at rank {exchange.rank}"


main()
