"""Weights as safetensors files: the form of record. Nothing here unpickles."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the tensors in sorted name order: each one's name, dtype, shape and little-endian bytes.

    It covers the values, not a file's layout, so equal weights have one digest wherever they are kept.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_weights(network: nn.Module, path: Path) -> str:
    """Write a network's parameters and buffers to a safetensors file; returns their `weights_sha256`."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    save_file(state, path)
    return weights_sha256(state)


def load_weights(network: nn.Module, path: Path) -> nn.Module:
    """Load a safetensors file into a network of the same structure, in place; every name must match."""
    network.load_state_dict(load_file(path))
    return network
