"""Shows which parts of an image raise the score of a class: Grad-CAM (Selvaraju et al., 2017, equations 1 and 2)."""

from typing import TypeGuard

import torch
from torch import Tensor, nn

SMALLEST_MAP = 3  # pixels per side; a coarser one shows nothing


def grad_cam(network: nn.Module, images: Tensor, classes: Tensor) -> Tensor | None:
    """Returns how much each part of an image raises the logit of a class.

    The map is the output of the last module that returns more than one pixel. Nothing before it is differentiated, so
    the memory is that of a prediction of this batch.

    Args:
        network: in evaluation mode; maps images to logits N×classes.
        images: normalised float N×C×H×W, on the network's device.
        classes: int64 [N], the class to explain per image.

    Returns:
        float32 N×h×w, on the CPU, in the size of the network's map: from 0 to 1, which is the largest value of each
        image; 0 everywhere if no part raises the logit. None if the network has no map of at least 3×3 pixels.
    """
    layer = _last_map(network, images[:1])
    if layer is None:
        return None
    maps = torch.empty(0)

    def start_gradient(_module: nn.Module, _inputs: object, output: object) -> object:
        nonlocal maps
        if not _is_map(output):  # the same module, used again behind the last map
            return output
        torch.set_grad_enabled(True)  # until `no_grad` below ends
        maps = output.detach().requires_grad_()
        return maps.clone()  # what follows may change it in place

    with torch.no_grad(), layer.register_forward_hook(start_gradient):
        logits = network(images)
    (gradient,) = torch.autograd.grad(logits.gather(1, classes.to(images.device)[:, None]).sum(), maps)
    heat = (gradient.mean((2, 3), keepdim=True) * maps.detach()).sum(1).relu().float().cpu()
    largest = heat.amax((1, 2), keepdim=True)
    return heat / largest.where(largest > 0, 1)


def _last_map(network: nn.Module, image: Tensor) -> nn.Module | None:
    """Returns the last module with a useful map as output: square, and large enough.

    There is none if the network goes on with tokens, as transformers do: what mixes them comes after the map.
    """
    found: tuple[nn.Module, int, int] | None = None

    def look(module: nn.Module, _inputs: object, output: object) -> None:
        nonlocal found
        if isinstance(output, Tensor) and output.ndim == 3 and output.shape[1] > 1:
            found = None
        if _is_map(output):
            found = module, output.shape[2], output.shape[3]

    hooks = [module.register_forward_hook(look) for module in network.modules()]
    try:
        with torch.no_grad():
            network(image)
    finally:
        for hook in hooks:
            hook.remove()
    if found is None:
        return None
    module, height, width = found
    return module if height == width >= SMALLEST_MAP else None


def _is_map(output: object) -> TypeGuard[Tensor]:
    return isinstance(output, Tensor) and output.ndim == 4 and output.shape[2:].numel() > 1
