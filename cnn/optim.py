"""Optimizers, with no weight decay on norms and biases."""

import torch
from torch import nn

from cnn.config import TrainConfig


def build_optimizer(config: TrainConfig, network: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that the configuration names, over the network's parameters.

    Only weight matrices and kernels are decayed: decaying a norm's scale or a bias gains nothing and, on small
    networks, costs accuracy (Bello et al., "Revisiting ResNets", 2021).
    """
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    match config.optimizer:
        case "sgd":
            nesterov = config.momentum > 0
            return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=True)
        case "adam":
            return torch.optim.Adam(groups, lr=config.lr, betas=(config.momentum, 0.999), fused=True)
        case "adamw":
            return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999), fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = rate
