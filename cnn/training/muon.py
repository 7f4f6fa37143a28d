"""The optimizer Muon, for networks of convolutions."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""The polynomial of a Newton-Schulz step in Jordan et al., "Muon" (2024): most singular values soon come near 1."""

NEWTON_SCHULZ_STEPS = 3
"""Jordan makes five, and three in his fastest trainings of small networks (airbench94_muon)."""


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, whose step is replaced, for matrices and kernels, by the nearest orthogonal matrix.

    So each direction of a kernel learns equally fast, rather than mostly the few that dominate the gradient. A kernel
    O×I×H×W counts as the matrix O×(I·H·W). Norms and biases make plain steps. Unlike `torch.optim.Muon` it takes
    kernels, and heeds `found_inf`, as the fused optimizers do. All ranks compute the same steps.

    Args:
        groups: each with `params`, `matrices` (whether these are matrices or kernels) and `weight_decay` (decoupled).
        precision: of the products of matrices.
    """

    found_inf: Tensor
    """Set before each step; not zero: nothing changes."""

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float, momentum: float, precision: torch.dtype) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "precision": precision})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Makes one step."""
        keeps = self.found_inf == 0
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum = self.state[parameter]["momentum_buffer"]
                gradient = torch.where(keeps, parameter.grad, 0)
                momentum.mul_(torch.where(keeps, group["momentum"], 1)).add_(gradient)
                change = gradient.add_(momentum, alpha=group["momentum"])
                if group["matrices"]:
                    change = orthogonalize(change, group["precision"])
                change = change.add(parameter, alpha=group["weight_decay"])
                parameter.add_(torch.where(keeps, change, 0), alpha=-group["lr"])


def orthogonalize(values: Tensor, precision: torch.dtype = torch.float32) -> Tensor:
    """Returns about the nearest matrix whose rows, or columns if these are fewer, are orthogonal and of length one.

    Newton-Schulz steps come near it without a decomposition. A matrix with more rows than columns is enlarged, so that
    outputs change as much as with a square one.

    Args:
        values: a matrix, or a kernel O×I×H×W, which counts as O×(I·H·W).
    """
    matrix = values.flatten(1)
    tall = matrix.shape[0] > matrix.shape[1]
    matrix = (matrix / matrix.norm().clamp_min(1e-7)).to(precision)
    matrix = matrix.T if tall else matrix
    a, b, c = COEFFICIENTS
    for _ in range(NEWTON_SCHULZ_STEPS):
        square = matrix @ matrix.T
        matrix = torch.addmm(matrix, torch.addmm(square, square, square, beta=b, alpha=c), matrix, beta=a)
    matrix = matrix.T if tall else matrix
    scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
    return matrix.float().mul_(scale).view_as(values)
