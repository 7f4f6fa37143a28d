"""Sets up the processes of a training: their group, device, threads and deterministic arithmetic."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from cnn.distributed.lanes import Exchange
from cnn.errors import InputError

THREADS_PER_RANK = 1  # another number would add a convolution's weight gradient in another order
EXCHANGE_TIMEOUT = timedelta(minutes=10)


@contextmanager
def process_group(store: dist.Store | None = None) -> Iterator[tuple[torch.device, Exchange]]:
    """Joins the ranks that torchrun started, or sets up a single process; yields this rank's device and the exchange.

    After an error a group of several ranks is not destroyed, since its destruction may wait for ranks that wait for
    this one (with NCCL it does). The process must then exit: this closes its connections, so that the other ranks stop
    waiting. Rank and world size are read from torchrun's variables (`RANK`, `WORLD_SIZE`, `LOCAL_RANK`).

    Args:
        store: rendezvous of the ranks; None: torchrun's (`MASTER_ADDR`, `MASTER_PORT`), or memory for a single process
            without torchrun.
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
    group = dist.new_group(timeout=EXCHANGE_TIMEOUT)  # it does not inherit the first group's
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
    """Returns this rank's device: the CUDA device of its local rank, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def check_devices(ranks: int) -> None:
    """Raises InputError unless each rank on this machine can have a device of its own; CPU cores can be shared."""
    if torch.cuda.is_available() and ranks > (gpus := torch.cuda.device_count()):
        raise InputError(
            f"{ranks} ranks need a GPU each, and this machine has {gpus}; set ranks to at most {gpus}, or "
            "CUDA_VISIBLE_DEVICES= to train on CPU cores"
        )


def device_count() -> int:
    """Returns the number of ranks that this machine can run: one per GPU, or one per CPU core of this process."""
    return torch.cuda.device_count() if torch.cuda.is_available() else len(os.sched_getaffinity(0))


def make_deterministic(*, tf32: bool = False) -> None:
    """Selects deterministic kernels and a fixed number of threads; call it before any computation.

    Args:
        tf32: see `set_tf32`.
    """
    set_tf32(tf32)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(THREADS_PER_RANK)
    # `use_deterministic_algorithms` does the same, but loads torch.compile, which takes seconds and is not used here.
    torch.set_deterministic_debug_mode("error")
    # Filling would only guard against bugs, at a cost in every step.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False


def set_tf32(on: bool) -> None:
    """Lets GPUs compute float32 matrix products and convolutions in TensorFloat-32, or not.

    TensorFloat-32 keeps 10 of the 23 bits of a mantissa. PyTorch's default is to use it for convolutions only. It makes
    no difference on a CPU.
    """
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = on


@contextmanager
def without_tf32() -> Iterator[None]:
    """Has GPUs compute float32 as such while the block runs; then convolutions and products are as they were before."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    set_tf32(False)
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products
