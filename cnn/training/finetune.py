"""Fine-tuning: which layers are trained in a step, and each layer's multiple of the learning rate.

Stages are listed in the order in which the network defines them, which is the order in which it runs them in all
networks but those that `check_finetuning` refuses.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cnn.config.training import FinetuneConfig, TrainConfig
from cnn.errors import InputError
from cnn.networks.weights import head_name
from cnn.training.optimizer import is_matrix

CONTAINERS = ("blocks", "encoder", "features", "layers", "stages", "trunk_output")
"""Names of modules whose entries are stages: in the networks of torchvision and timm they only hold the others."""


class Stage(NamedTuple):
    """A part of a network's body."""

    name: str
    modules: list[nn.Module]
    parameters: list[nn.Parameter]


def head_of(network: nn.Module) -> nn.Linear | nn.Conv2d:
    """Returns a network's head; see `head_name`."""
    head = network.get_submodule(head_name(network))
    assert isinstance(head, nn.Linear | nn.Conv2d)
    return head


def split_into_stages(network: nn.Module) -> list[Stage]:
    """Returns the stages of the network's body, which is all but the head; see `head_name`.

    Stages are the network's own modules that have parameters, such as `layer3`, and the entries of `CONTAINERS` and of
    the module that holds the head, such as `blocks.5`. A norm alone belongs to the stage before it. Parameters outside
    all of these, such as a class token, belong to the first stage.
    """
    head = head_of(network)
    stages: list[Stage] = []
    for name, module in _parts(network, head):
        parameters = list(module.parameters())
        if stages and not any(is_matrix(parameter) for parameter in parameters):
            stages[-1].modules.append(module)
            stages[-1].parameters.extend(parameters)
        else:
            stages.append(Stage(name, [module], parameters))
    placed = {*head.parameters(), *(parameter for stage in stages for parameter in stage.parameters)}
    if stages:
        stages[0].parameters.extend(parameter for parameter in network.parameters() if parameter not in placed)
    return stages


def _parts(module: nn.Module, head: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if child is head or not any(True for _ in child.parameters()):
            continue
        if name in CONTAINERS or any(inner is head for inner in child.modules()):
            yield from _parts(child, head, f"{prefix}{name}.")
        else:
            yield prefix + name, child


def rate_factors(config: FinetuneConfig, network: nn.Module) -> dict[nn.Parameter, float]:
    """Returns the multiple of the learning rate for each parameter; of those that are not in it, it is 1.

    Of n stages, the k-th (counted from 1) has layer_decay ** (n + 1 - k), so the last one has layer_decay (Clark et
    al., "ELECTRA", 2020).
    """
    if config.head_lr == config.layer_decay == 1:
        return {}
    stages = split_into_stages(network)
    factors = {
        parameter: config.layer_decay ** (len(stages) - place)
        for place, stage in enumerate(stages)
        for parameter in stage.parameters
    }
    return factors | dict.fromkeys(head_of(network).parameters(), config.head_lr)


class Freezing:
    """The frozen layers of a network; whether they are frozen is a function of the step.

    Frozen layers are in evaluation mode: batch norm neither uses nor changes the statistics of the batch, and nothing
    is dropped. Their parameters need no gradient, and, since only trained layers come after them, autograd records
    nothing before the first trained layer. With `finetune.batch_norm=frozen`, all batch norms stay in evaluation mode.

    Raises:
        InputError: the network has no such stage.
    """

    def __init__(self, config: TrainConfig, network: nn.Module, *, steps_per_epoch: int) -> None:
        freeze, epochs = config.finetune.freeze, config.finetune.freeze_epochs
        stages = split_into_stages(network) if freeze != "none" else []
        if freeze not in ("none", "body"):
            names = [stage.name for stage in stages]
            if freeze not in names:
                raise InputError(
                    f"finetune.freeze: {config.model} has no stage {freeze!r}; it has {', '.join(names)}; "
                    "`body` is all of them"
                )
            stages = stages[: names.index(freeze) + 1]
        self._modules = [module for stage in stages for module in stage.modules]
        with_statistics = network.modules() if config.finetune.batch_norm == "frozen" else ()
        self._norms = [module for module in with_statistics if isinstance(module, _BatchNorm)]
        self._parameters = [parameter for stage in stages for parameter in stage.parameters if parameter.requires_grad]
        self._steps = 0 if not stages else math.inf if epochs is None else epochs * steps_per_epoch

    def holds(self, step: int) -> bool:
        """Whether the layers are frozen in a step, counted from 0."""
        return step < self._steps

    def apply(self, frozen: bool) -> None:
        """Freezes the layers, or has them trained."""
        for module in self._modules:
            module.train(not frozen)
        for norm in self._norms:
            norm.eval()
        for parameter in self._parameters:
            parameter.requires_grad_(not frozen)

    def layers(self) -> Iterator[nn.Module]:
        """Yields the modules inside the frozen stages that hold no others."""
        return (layer for module in self._modules for layer in module.modules() if not [*layer.children()])


def check_finetuning(config: TrainConfig, network: nn.Module, images: Tensor) -> None:
    """Checks whether a network can be fine-tuned as the configuration says; changes the network.

    Frozen layers must come before all others. So the network is run once on some images: then no output of a frozen
    layer may need a gradient.

    Raises:
        InputError: there is no such stage, or a frozen layer comes after one that is trained.
    """
    rate_factors(config.finetune, network)
    freezing = Freezing(config, network, steps_per_epoch=1)
    if not freezing.holds(0):
        return
    freezing.apply(frozen=True)
    late: list[nn.Module] = []

    def note(module: nn.Module, _: object, output: object) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            late.append(module)

    for layer in freezing.layers():
        layer.register_forward_hook(note)
    network(images)
    if late:
        raise InputError(
            f"finetune.freeze={config.finetune.freeze} cannot be used with {config.model}, which runs frozen layers "
            "after trained ones, so that the frozen ones would cost a backward pass"
        )
