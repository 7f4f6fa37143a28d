"""Derives random streams from their purpose by pure functions: no generator state is ever carried over or saved."""

import hashlib

import torch
from torch import Tensor


def stream_seed(*parts: int | str) -> int:
    """Returns a 63-bit seed that depends on the parts only, such as `stream_seed(seed, "augment", step, lane)`."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def generator(device: torch.device, *parts: int | str) -> torch.Generator:
    """Returns a new generator on `device`, seeded by the parts."""
    return torch.Generator(device).manual_seed(stream_seed(*parts))


def seed_default_generator(device: torch.device, *parts: int | str) -> None:
    """Seeds the generator from which layers such as dropout draw on `device`.

    `torch.manual_seed` seeds the generators of all kinds of devices, which takes fifty times as long.
    """
    seed = stream_seed(*parts)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """Returns the order of a split's images in an epoch: an int64 permutation of 0 … count - 1, on the CPU."""
    return torch.randperm(count, generator=generator(torch.device("cpu"), seed, "order", epoch))
