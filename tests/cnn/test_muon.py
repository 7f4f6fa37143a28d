"""Muon's step: orthogonal for matrices and kernels, plain for the rest."""

import pytest
import torch

from cnn.config.training import TrainConfig
from cnn.training.muon import orthogonalize
from cnn.training.optimizer import build_optimizer, set_learning_rate


@pytest.mark.parametrize("shape", [(8, 8), (5, 20), (20, 5), (16, 4, 3, 3), (64, 2, 2, 2)])
def test_all_directions_of_a_step_are_about_equally_long_and_the_same_as_the_gradients(shape: tuple[int, ...]) -> None:
    random = torch.Generator().manual_seed(0)
    gradient = torch.randn(shape, generator=random) * 1e-3
    step = orthogonalize(gradient).flatten(1)
    rows, columns = step.shape
    left, _, right = torch.linalg.svd(gradient.flatten(1).double(), full_matrices=False)
    turned = left.T @ step.double() @ right.T  # diagonal, if the directions are the same
    scale = max(1, rows / columns) ** 0.5
    assert (turned - turned.diag().diag()).abs().max() < 1e-3 * scale
    assert (0.5 * scale < turned.diag()).all()
    assert (turned.diag() < 1.3 * scale).all()
    in_bfloat16 = orthogonalize(gradient, torch.bfloat16).flatten(1)
    assert (in_bfloat16 - step).norm() < 0.05 * step.norm()


@pytest.mark.parametrize("momentum", [0.5, 0.0])
def test_a_step_has_momentum_decay_and_the_learning_rate_of_its_group(momentum: float) -> None:
    network = torch.nn.Linear(3, 2)
    config = TrainConfig(optimizer="muon", momentum=momentum, weight_decay=0.1)
    optimizer = build_optimizer(config, network, {network.bias: 10.0})
    set_learning_rate(optimizer, 0.01)
    weight, bias = network.weight.detach().clone(), network.bias.detach().clone()
    first, second = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]), torch.tensor([[0.0, 0.0, 3.0], [1.0, 0.0, 0.0]])
    optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    for gradient, average, of_bias in ((first, first, 1), (second, momentum * first + second, 1 + momentum)):
        network.weight.grad, network.bias.grad = gradient.clone(), torch.ones(2)
        optimizer.step()
        bias = bias - 0.1 * (1 + momentum * of_bias)
        weight = weight - 0.01 * (orthogonalize(gradient + momentum * average) + 0.1 * weight)
        torch.testing.assert_close(network.bias.detach(), bias)
        torch.testing.assert_close(network.weight.detach(), weight)


def test_nothing_changes_after_a_figure_that_is_not_finite() -> None:
    network = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(TrainConfig(optimizer="muon"), network)
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    before = [tensor.clone() for tensor in network.parameters()]
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(before, network.parameters(), strict=True))
    assert not any(state["momentum_buffer"].any() for state in optimizer.state.values())
