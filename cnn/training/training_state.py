"""Copies and restores the state on which the later steps of a training depend."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from cnn.errors import InputError
from cnn.evaluation.evaluate import Score
from cnn.networks.weights import copy_to_host
from cnn.training.trainer import Trainer


def take_state(trainer: Trainer) -> dict[str, Tensor]:
    """Returns the state by name, copied into host memory. The figures of all steps must have been read."""
    assert not trainer.reports.in_flight
    history = [[score.loss, score.accuracy] for score in trainer.history]
    return {
        **copy_to_host(_tensors(trainer)),
        **{f"best/{name}": tensor for name, tensor in trainer.best.items()},
        "progress/step": torch.tensor(trainer.step),
        "progress/history": torch.tensor(history, dtype=torch.float64),
        "progress/recent": torch.tensor(trainer.reports.recent, dtype=torch.float64),
    }


def restore(trainer: Trainer, state: Mapping[str, Tensor] | None) -> None:
    """Restores the first rank's `state` on all ranks; changes nothing if that is None.

    Every rank calls it before its first step. The `state` of the other ranks is ignored.

    Raises:
        InputError: the state belongs to another training.
    """
    header = torch.zeros(5)
    if state is not None:
        _check(state, {"progress/step": torch.tensor(0)})
        has_best = any(name.startswith("best/") for name in state)
        lengths = [len(state["progress/history"]), len(state["progress/recent"])]
        header = torch.tensor([1, int(state["progress/step"]), *lengths, has_best])
    present, step, epochs, recent, with_best = (int(value) for value in _from_first(trainer, header.double()).tolist())
    if not present:
        return
    trainer.prepare_for(max(step - 1, 0))  # the last step decides which parameters have a state in the optimizer
    current = _tensors(trainer)
    if state is not None:
        _check(state, current)
    best = {f"best/{name}": tensor for name, tensor in trainer.network.state_dict().items()} if with_best else {}
    wanted = {
        **current,
        **best,
        "progress/step": torch.tensor(0),
        "progress/history": torch.zeros(epochs, 2, dtype=torch.float64),
        "progress/recent": torch.zeros(recent, 4, dtype=torch.float64),
    }
    got = {name: _from_first(trainer, like if state is None else state[name]) for name, like in wanted.items()}
    with torch.no_grad():
        for name, tensor in current.items():
            tensor.copy_(got[name])
    trainer.step = int(got["progress/step"])
    trainer.history = [Score(loss=loss, accuracy=accuracy) for loss, accuracy in got["progress/history"].tolist()]
    trainer.reports.recent = got["progress/recent"].tolist()
    trainer.best = {name.removeprefix("best/"): got[name].cpu() for name in best}


def _check(state: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> None:
    for name, tensor in current.items():
        if name not in state or state[name].shape != tensor.shape or state[name].dtype != tensor.dtype:
            raise InputError(f"the checkpoint belongs to another training: its {name} is missing or does not fit")


def _from_first(trainer: Trainer, tensor: Tensor) -> Tensor:
    """Returns a copy of the first rank's tensor, on every rank."""
    copied = tensor.detach().to(trainer.device, copy=True).contiguous()
    if trainer.exchange.world_size > 1:
        dist.broadcast(copied, src=0)
    return copied


def _tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Returns the live tensors of network, optimizer and moving average, by name."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in trainer.network.named_parameters()}
    tensors = {f"network/{name}": tensor for name, tensor in trainer.network.state_dict().items()}
    for parameter, state in trainer.optimizer.state.items():
        tensors |= {f"optimizer/{names[parameter]}/{key}": value for key, value in state.items()}
    if trainer.average is not None:
        tensors |= {f"average/{name}": tensor for name, tensor in trainer.average.state_dict().items()}
    return tensors
