"""Looks up what torchvision and timm know of the weights that they publish. Downloads nothing."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from cnn.config.networks import TimmOptions, TorchvisionOptions, find_network
from cnn.errors import InputError

OLD_DENSENET = re.compile(r"(\.denselayer\d+\.(?:norm|conv))\.([12]\.)")
"""Names in torchvision's files of DenseNets, whose layers it has renamed since."""

TIMM_RELEASES = re.compile(r"https://github\.com/(rwightman|huggingface)/pytorch-image-models/.*-[0-9a-f]{8}\.pth")
"""Files in which tensors have timm's own names; the others that timm knows are of the networks' authors."""

ON_IMAGENET = re.compile(r"in(1k|12k|2[12]k)")


class Published(NamedTuple):
    """Weights of a network that were trained on ImageNet."""

    name: str
    """It also says which of the network's weights: `torchvision/resnet50.IMAGENET1K_V2`, `timm/resnet18.a1_in1k`."""

    addresses: tuple[str, ...]
    """Addresses of official files, https: or `hf:owner/name/file` (on the Hugging Face Hub). Any of them will do."""

    size: int | None
    """Bytes of a file, to within some percent; None if unknown."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Of the images in training, per channel, on the scale 0 … 1."""

    licence: str


def published_weights(model: str) -> Published:
    """Returns what its library knows of the ImageNet weights of a network.

    Where there are several, timm's own choice, and the newest of torchvision's.

    Raises:
        InputError: nobody has published such weights.
    """
    network = find_network(model)
    find = {TorchvisionOptions: _of_torchvision, TimmOptions: _of_timm}.get(network.options)
    found = find(network.arguments["name"]) if find else None
    if found is None:
        raise InputError(
            f"pretrained=imagenet: no ImageNet weights of {model} are known; give a safetensors file (pretrained=FILE)"
        )
    return found


def with_present_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a file's tensors under the names of today's networks, as torchvision does."""
    return {OLD_DENSENET.sub(r"\1\2", name): tensor for name, tensor in tensors.items()}


def _of_torchvision(name: str) -> Published | None:
    from torchvision import models  # slow, so only if it is asked; likewise timm

    # Newer versions come later. Others are for other licences (SWAG: not for commercial use) or uses (FEATURES).
    versions = [each for each in models.get_model_weights(name) if each.name.startswith("IMAGENET1K_V")]  # type: ignore[attr-defined]
    if not versions:
        return None
    weights = versions[-1]
    images = weights.transforms()
    return Published(
        name=f"torchvision/{name}.{weights.name}",
        addresses=(weights.url,),
        size=int(weights.meta["_file_size"] * 2**20),
        mean=tuple(images.mean),
        std=tuple(images.std),
        licence="BSD-3-Clause",
    )


def _of_timm(name: str) -> Published | None:
    import timm

    for each in (name, *timm.list_pretrained(f"{name}.*")):
        weights = timm.get_pretrained_cfg(each)
        if weights is None or not ON_IMAGENET.search(weights.tag or "") or weights.custom_load:
            continue
        addresses = []
        if weights.hf_hub_id:
            addresses.append(f"hf:{weights.hf_hub_id}/{weights.hf_hub_filename or 'model.safetensors'}")
        if TIMM_RELEASES.fullmatch(url := str(weights.url)):
            addresses.append(url)
        if addresses:
            return Published(
                name=f"timm/{name}.{weights.tag}",
                addresses=tuple(addresses),
                size=None,
                mean=tuple(weights.mean),
                std=tuple(weights.std),
                licence=weights.license or "not stated",
            )
    return None
