"""Hashes, saves and loads weights as safetensors files. Unpickles nothing."""

import difflib
import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cnn.errors import InputError


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 of the tensors in the order of their names: name, dtype, shape and little-endian bytes.

    It covers the values, not a file's layout, so equal weights have the same digest in all files.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def copy_to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies tensors into host memory, including those that are there already."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def save_weights(state: Mapping[str, Tensor], path: Path) -> str:
    """Writes a network's parameters and buffers, by name, to a safetensors file; returns their `weights_sha256`."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, path)
    return weights_sha256(state)


def load_weights(network: nn.Module, path: Path) -> nn.Module:
    """Loads a safetensors file into a network of the same structure, in place; all names must match."""
    network.load_state_dict(load_file(path))
    return network


def load_pretrained(network: nn.Module, path: Path) -> tuple[str, ...]:
    """Loads weights that the same network has learned on other classes or images, in place.

    The file's last linear layer may be for another number of classes, its first convolution for another number of
    channels. If the file's convolution has three input channels and the network's has one, the weights are summed over
    the channels: a grey image then gives what it would give as RGB. Nothing is changed unless all else fits.

    Args:
        network: keeps its values where the file has none that fit.
        path: safetensors file.

    Returns:
        Names of the tensors that keep their values, because the file's are for other classes or channels.

    Raises:
        InputError: the file cannot be read, or contains the weights of another network.
    """
    try:
        loaded = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read as a safetensors file: {error}") from None
    current = network.state_dict()
    _check_names(current.keys(), loaded.keys(), path)
    layers = list(network.named_modules())
    first = next((f"{name}.weight" for name, layer in layers if isinstance(layer, nn.Conv2d)), None)
    last = next((name for name, layer in reversed(layers) if isinstance(layer, nn.Linear)), None)
    by_classes = (f"{last}.weight", f"{last}.bias")
    fitting, kept = {}, []
    for name in filter(loaded.__contains__, current):
        wanted, found = current[name].shape, loaded[name].shape
        if found == wanted:
            fitting[name] = loaded[name]
        elif name == first and wanted == (*found[:1], 1, *found[2:]) and found[1] == 3:
            fitting[name] = loaded[name].sum(1, keepdim=True)
        elif (name == first and wanted == (*found[:1], wanted[1], *found[2:])) or (
            name in by_classes and wanted[1:] == found[1:]
        ):
            kept.append(name)
        else:
            raise InputError(
                f"{path} is of another network: {name} is {_size(found)} in the file, but {_size(wanted)} here; "
                "set the network's options (network.*) and data.image_size as for that file"
            )
    network.load_state_dict(fitting, strict=False)
    return tuple(kept)


def _check_names(current: Collection[str], loaded: Collection[str], path: Path) -> None:
    # Batch norm's step counters are not needed, and older files do not have them.
    missing = [name for name in current if name not in loaded and not name.endswith(".num_batches_tracked")]
    unknown = sorted(name for name in loaded if name not in current)
    if not missing and not unknown:
        return
    matched = sum(name in loaded for name in current)
    if missing:
        near = difflib.get_close_matches(missing[0], unknown, n=1, cutoff=0)
        detail = f"there is no {missing[0]!r} in it" + (f", the nearest is {near[0]!r}" if near else "")
    else:
        near = difflib.get_close_matches(unknown[0], current, n=1, cutoff=0)
        detail = f"there is no {unknown[0]!r} here, the nearest is {near[0]!r}"
    raise InputError(f"{path} is of another network: {matched} of {len(current)} names match; {detail}")


def _size(shape: torch.Size) -> str:
    return "×".join(map(str, shape)) or "a scalar"
