"""Builds optimizers, without weight decay of norms and biases."""

from collections.abc import Mapping

import torch
from torch import nn

from cnn.config.training import TrainConfig
from cnn.training.muon import Muon


def build_optimizer(
    config: TrainConfig, network: nn.Module, factors: Mapping[nn.Parameter, float] | None = None
) -> torch.optim.Optimizer:
    """Builds the optimizer that the configuration names, for the network's parameters that are trained.

    Only matrices and kernels are decayed: decaying a norm's scale or a bias gains nothing and, on small networks, costs
    accuracy (Bello et al., "Revisiting ResNets", 2021).

    Args:
        factors: multiples of the learning rate; of parameters that are not among them, 1.
    """
    by_group: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for parameter in filter(lambda parameter: parameter.requires_grad, network.parameters()):
        by_group.setdefault((is_matrix(parameter), (factors or {}).get(parameter, 1.0)), []).append(parameter)
    groups = [
        {
            "params": parameters,
            "matrices": matrices,
            "weight_decay": matrices * config.weight_decay,
            "lr_factor": factor,
        }
        for (matrices, factor), parameters in by_group.items()
    ]
    optimizer: torch.optim.Optimizer
    match config.optimizer:
        case "sgd":
            nesterov = config.momentum > 0
            optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=True)
        case "muon":
            low = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
            return Muon(groups, lr=config.lr, momentum=config.momentum, precision=low)
        case "adam":
            optimizer = torch.optim.Adam(groups, lr=config.lr, betas=(config.momentum, 0.999), fused=True)
        case "adamw":
            optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999), fused=True)
    _fill_state(optimizer)
    return optimizer


def is_matrix(parameter: nn.Parameter) -> bool:
    """Checks for a matrix or kernel, not a bias or one factor per channel, of any shape (ConvNeXt's are C×1×1)."""
    return parameter.shape[1:].numel() > 1


def _fill_state(optimizer: torch.optim.Optimizer) -> None:
    """Creates the state that torch would create in the first step, so that a checkpoint can be loaded into it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if isinstance(optimizer, torch.optim.SGD):
                if group["momentum"]:
                    optimizer.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
            else:
                optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of the next steps, of which each group has its multiple."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]
