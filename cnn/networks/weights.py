"""Hashes, saves and loads weights as safetensors files.

Files of PyTorch (.pth) are read by `torch.load(weights_only=True)`, whose unpickler makes tensors and plain containers,
and refuses all else; nothing else is unpickled.
"""

import difflib
import hashlib
import re
import warnings
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


def read_pth(path: Path, named: str) -> dict[str, Tensor]:
    """Reads a mapping of names to tensors from a file that `torch.save` has written; takes nothing else.

    Args:
        named: the file's name for messages.

    Returns:
        Copies on the CPU, contiguous, in the file's order.

    Raises:
        InputError: the file cannot be read, or holds anything else.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file makes it raise nearly anything
        if wanted := re.search(r"GLOBAL (\S+)", str(error)):
            raise InputError(
                f"{named} is refused: to read it, {wanted[1]} would have to be called; give names and tensors only, as "
                "torch.save(network.state_dict(), …) writes them, or a safetensors file"
            ) from None
        raise InputError(f"{named} is damaged, or is not a file of tensors that torch.save has written") from None
    if not isinstance(loaded, Mapping) or not loaded:
        raise InputError(f"{named} holds {_kind(loaded)}, not a mapping of names to tensors")
    for name, value in loaded.items():
        plain = type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided and not value.is_quantized
        if not isinstance(name, str) or not plain or value.device.type != "cpu":
            raise InputError(f"{named} holds {_kind(value)} under {name!r}, where only dense tensors are read")
    return {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in loaded.items()}


def in_order_of(network: nn.Module, tensors: Mapping[str, Tensor], named: str) -> dict[str, Tensor]:
    """Returns tensors under the network's names, for a file that is known to have them in the network's order.

    `load_pretrained` checks the shapes.

    Raises:
        InputError: their number differs.
    """
    names = network.state_dict().keys()
    if len(names) != len(tensors):
        raise InputError(f"{named} is of another network: it holds {len(tensors)} tensors, the network {len(names)}")
    return dict(zip(names, tensors.values(), strict=True))


def load_weights(network: nn.Module, path: Path) -> nn.Module:
    """Loads a safetensors file into a network of the same structure, in place; all names must match."""
    network.load_state_dict(load_file(path))
    return network


def head_name(network: nn.Module) -> str:
    """Returns the name of the head, whose size depends on the classes.

    It is the last linear layer, or in a network without any, such as SqueezeNet, the last convolution.

    Raises:
        InputError: it has neither.
    """
    layers: list[tuple[str, nn.Module]] = [*network.named_modules()][::-1]
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d)
    found = next((name for kind in kinds for name, layer in layers if isinstance(layer, kind)), None)
    if found is None:
        raise InputError("finetune.* and pretrained need a head: the network has no nn.Linear and no nn.Conv2d")
    return found


def load_pretrained(network: nn.Module, path: Path, *, named: str | None = None) -> tuple[str, ...]:
    """Loads weights that the same network has learned on other classes or images, in place.

    The file's head may be for another number of classes, its first convolution for another number of channels. If the
    file's convolution has three input channels and the network's has one, the weights are summed over the channels: a
    grey image then gives what it would give as RGB. Nothing is changed unless all else fits.

    Args:
        network: keeps its values where the file has none that fit; a head for other classes gets PyTorch's own random
            weights, from the default generator.
        path: safetensors file.
        named: the file's name for messages; None takes its path.

    Returns:
        Names of the tensors without a value from the file, because the file's are for other classes or channels.

    Raises:
        InputError: the file cannot be read, or contains the weights of another network.
    """
    named = named or str(path)
    try:
        loaded = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{named} cannot be read as a safetensors file: {error}") from None
    current = network.state_dict()
    _check_names(current.keys(), loaded.keys(), named)
    first = next((f"{name}.weight" for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d)), None)
    last = head_name(network)
    by_classes = (f"{last}.weight", f"{last}.bias")
    fitting, fresh = {}, []
    for name in filter(loaded.__contains__, current):
        wanted, found = current[name].shape, loaded[name].shape
        if found == wanted:
            fitting[name] = loaded[name]
        elif name == first and wanted == (*found[:1], 1, *found[2:]) and found[1] == 3:
            fitting[name] = loaded[name].sum(1, keepdim=True)
        elif (name == first and wanted == (*found[:1], wanted[1], *found[2:])) or (
            name in by_classes and wanted[1:] == found[1:]
        ):
            fresh.append(name)
        else:
            raise InputError(
                f"{named} is of another network: {name} is {_size(found)} in the file, but {_size(wanted)} here; "
                "set the network's options (network.*) and data.image_size as for that file"
            )
    network.load_state_dict(fitting, strict=False)
    if f"{last}.weight" in fresh:
        # Some networks begin with a head so large that its gradients spoil the body in the first steps.
        network.get_submodule(last).reset_parameters()  # type: ignore[operator]
    return tuple(fresh)


def _check_names(current: Collection[str], loaded: Collection[str], named: str) -> None:
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
    raise InputError(f"{named} is of another network: {matched} of {len(current)} names match; {detail}")


def _kind(value: object) -> str:
    return f"an object of type {type(value).__qualname__}"


def _size(shape: torch.Size) -> str:
    return "×".join(map(str, shape)) or "a scalar"
