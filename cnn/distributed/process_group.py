"""The processes of a training: their group, device, threads and deterministic arithmetic."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from cnn.distributed.lanes import Exchange

THREADS_PER_RANK = 1  # another count would add a convolution's weight gradient in another order
EXCHANGE_TIMEOUT = timedelta(minutes=10)


@contextmanager
def process_group(store: dist.Store | None = None) -> Iterator[tuple[torch.device, Exchange]]:
    """Joins the processes that torchrun started, or is a single one; yields this rank's device and the exchange.

    After an error a group of several ranks is not destroyed, since that may wait for ranks that wait for this one
    (NCCL's does). The process must then end itself: this closes its connections, so that the other ranks stop waiting.

    Rank and world size come from the variables that torchrun sets (`RANK`, `WORLD_SIZE`, `LOCAL_RANK`).

    Args:
        store: where the ranks meet; None for torchrun's own (`MASTER_ADDR`, `MASTER_PORT`), or for a single process
            without torchrun, memory.
    """
    device = local_device()
    if store is None and "WORLD_SIZE" not in os.environ:
        store = dist.HashStore()
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=int(os.environ.get("RANK", 0)),
        world_size=int(os.environ.get("WORLD_SIZE", 1)),
        timeout=EXCHANGE_TIMEOUT,
    )
    group = dist.new_group(timeout=EXCHANGE_TIMEOUT)  # which does not inherit the first group's
    assert isinstance(group, dist.ProcessGroup)
    exchange = Exchange(group)
    try:
        yield device, exchange
        exchange.close()
    except BaseException:
        if exchange.world_size == 1:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def local_device() -> torch.device:
    """This rank's device: the CUDA device of its local rank, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def device_count() -> int:
    """How many ranks this machine runs at once: one per GPU, or one per CPU core that this process may use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else len(os.sched_getaffinity(0))


def make_deterministic() -> None:
    """Choose deterministic kernels and a fixed number of threads; call it before anything is computed."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(THREADS_PER_RANK)
    # `use_deterministic_algorithms` does the same, and loads torch.compile, which takes seconds and is not used here.
    torch.set_deterministic_debug_mode("error")
    # It guards against bugs, at a cost in every step.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
