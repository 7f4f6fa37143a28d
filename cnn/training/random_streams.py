"""Random streams as pure functions of what they are for: no generator state is ever carried over or saved."""

import hashlib

import torch
from torch import Tensor


def stream_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part, and on nothing else: `stream_seed(seed, "augment", step, lane)`."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def generator(device: torch.device, *parts: int | str) -> torch.Generator:
    """A new generator on `device`, seeded by the parts."""
    return torch.Generator(device).manual_seed(stream_seed(*parts))


def seed_default_generator(device: torch.device, *parts: int | str) -> None:
    """Seed the generator that layers such as dropout draw from on `device`.

    `torch.manual_seed` seeds those of every kind of device, which takes fifty times as long.
    """
    seed = stream_seed(*parts)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """The order of a split's images in an epoch: int64 permutation of 0 … count - 1, on the CPU."""
    return torch.randperm(count, generator=generator(torch.device("cpu"), seed, "order", epoch))
