"""Fine-tuning: what is frozen stays as it was, what is trained learns at its rate, and ranks change nothing."""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cnn.config.training import TrainConfig
from cnn.distributed.lanes import Exchange
from cnn.errors import InputError
from cnn.networks.build import build_network
from cnn.networks.weights import save_weights, weights_sha256
from cnn.networks.wrappers import Normalise
from cnn.training.augment import augment
from cnn.training.features import dropout_before_head
from cnn.training.finetune import Freezing, check_finetuning, rate_factors, split_into_stages
from cnn.training.random_streams import generator
from cnn.training.schedule import learning_rate
from cnn.training.trainer import Trainer
from cnn.training.training_state import restore, take_state
from tests.cnn.conftest import Packed, Ranks, joined_group

CONVOY9: dict[str, Any] = {"network": {"width": 4, "dropout": 0.2}, "batch_size": 64, "augment": {"shift": 1}}


@pytest.fixture(scope="module")
def group() -> Iterator[tuple[torch.device, Exchange]]:
    with joined_group() as joined:
        yield joined


Make = Callable[..., Trainer]


@pytest.fixture
def trainer_of(digits: Packed, group: tuple[torch.device, Exchange]) -> Make:
    def make(finetune: dict[str, Any], pretrained: Path | None = None, **keys: Any) -> Trainer:
        return Trainer(
            TrainConfig.model_validate({"epochs": 2, "lanes": 2, "finetune": finetune} | CONVOY9 | keys),
            manifest=digits.manifest,
            train_split=digits.split("train"),
            val_split=digits.split("val"),
            device=group[0],
            exchange=group[1],
            pretrained=pretrained,
        )

    return make


def steps(trainer: Trainer, count: int) -> None:
    for _ in range(count):
        trainer.train_step()
    assert [*trainer.reports.until(trainer.step)]


def changed(trainer: Trainer, before: dict[str, Tensor]) -> set[str]:
    """The first part of the names of all tensors, buffers included, that are not as before."""
    now = trainer.network.state_dict()
    return {name.partition(".")[0] for name in now if not torch.equal(now[name], before[name])}


def copied(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.network.state_dict().items()}


@pytest.mark.parametrize(
    ("freeze", "trained"),
    [
        ("none", {"stem", "stage1", "stage2", "head", "linear"}),
        ("stem", {"stage1", "stage2", "head", "linear"}),
        ("stage2", {"head", "linear"}),
        ("body", {"linear"}),
    ],
)
def test_frozen_stages_keep_weights_and_batch_norm_statistics_also_after_a_validation(
    freeze: str, trained: set[str], trainer_of: Make
) -> None:
    trainer = trainer_of({"freeze": freeze}, ema=0.5)
    before = copied(trainer)
    steps(trainer, 1)
    trainer.validate()
    steps(trainer, 1)
    assert changed(trainer, before) == trained
    assert trainer.average is not None
    for name, tensor in trainer.average.state_dict().items():  # equal bits give an average of these bits
        assert torch.equal(tensor, before[name]) == (name.partition(".")[0] not in trained)


def test_frozen_batch_norm_normalises_by_the_statistics_that_it_had_and_keeps_them(trainer_of: Make) -> None:
    trainer = trainer_of({"batch_norm": "frozen"})
    before = copied(trainer)
    steps(trainer, 1)
    trainer.validate()
    steps(trainer, 1)
    now = trainer.network.state_dict()
    statistics = {name for name in now if name.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert {name for name in now if torch.equal(now[name], before[name])} == statistics
    assert not any(layer.training for layer in trainer.network.modules() if isinstance(layer, nn.BatchNorm2d))
    assert trainer.network.training  # dropout still drops


def test_frozen_layers_record_nothing_for_a_backward_pass_and_have_no_gradient_exchange_or_state(
    trainer_of: Make,
) -> None:
    trainer = trainer_of({"freeze": "stage1"})
    outputs = {}
    for name in ("stem", "stage1", "stage2"):
        stage = trainer.network.get_submodule(name)
        stage.register_forward_hook(lambda _m, _i, out, name=name: outputs.update({name: out.grad_fn}))
    steps(trainer, 1)
    assert outputs["stem"] is None and outputs["stage1"] is None and outputs["stage2"] is not None
    trained = {p for name in ("stage2", "head", "linear") for p in trainer.network.get_submodule(name).parameters()}
    assert {p for p in trainer.network.parameters() if p.grad is not None} == trained
    assert set(trainer.optimizer.state) == set(trainer.lanes._parameters) == trained
    exchanged = {id(buffer) for buffer in trainer.lanes._averaged}
    assert {name for name, buffer in trainer.network.named_buffers() if id(buffer) in exchanged} == {
        name
        for name, buffer in trainer.network.named_buffers()
        if name.startswith(("stage2", "head")) and buffer.is_floating_point()
    }


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_after_the_boundary_everything_is_trained_and_the_head_keeps_its_optimizers_state(
    optimizer: str, trainer_of: Make
) -> None:
    trainer = trainer_of({"freeze": "body", "freeze_epochs": 1}, optimizer=optimizer, lr=0.01)
    boundary = trainer.steps_per_epoch
    steps(trainer, boundary)
    before = copied(trainer)
    head, kernel = trainer.network.linear.weight, trainer.network.stem[0].weight
    state = {key: value.clone() for key, value in trainer.optimizer.state[head].items()}
    parallel = weakref.ref(trainer.lanes)
    trainer.prepare_for(boundary)
    assert all(torch.equal(trainer.optimizer.state[head][key], value) for key, value in state.items())
    assert not any(value.any() for value in trainer.optimizer.state[kernel].values())
    gc.collect()
    assert parallel() is None
    steps(trainer, 1)
    assert changed(trainer, before) == {"stem", "stage1", "stage2", "head", "linear"}
    if optimizer == "adamw":
        assert int(trainer.optimizer.state[head]["step"]) == boundary + 1
        assert int(trainer.optimizer.state[kernel]["step"]) == 1


def test_frozen_and_then_trained_equals_the_steps_made_by_hand(trainer_of: Make) -> None:
    """Head alone for an epoch, then the body at a tenth of its rate: plain torch, without lanes or Freezing."""
    finetune = {"freeze": "body", "freeze_epochs": 1, "head_lr": 10.0, "layer_decay": 0.5}
    keys = {"lanes": 1, "lr": 0.01, "label_smoothing": 0.0, "network": {"width": 4}, "momentum": 0.0}
    trainer = trainer_of(finetune, **keys)
    network = copy.deepcopy(trainer.network).requires_grad_(True)
    depths = {"stem": 4, "stage1": 3, "stage2": 2, "head": 1}
    for step in range(trainer.steps_per_epoch + 2):
        frozen = step < trainer.steps_per_epoch
        for name in depths:
            network.get_submodule(name).train(not frozen)
        batch = next(iter(trainer.train_split.batches([trainer._samples(step).flatten(1)])))
        images, labels = _as_the_network_gets_them(trainer, step, *batch)
        loss = nn.functional.cross_entropy(network(images), labels)
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        rate = learning_rate(trainer.config, step, trainer.total_steps)
        with torch.no_grad():
            for (name, parameter), gradient in zip(network.named_parameters(), gradients, strict=True):
                part = name.partition(".")[0]
                if frozen and part != "linear":
                    continue
                multiple = 10.0 if part == "linear" else 0.5 ** depths[part]
                decay = trainer.config.weight_decay if parameter.dim() > 1 else 0.0
                parameter -= rate * multiple * (gradient + decay * parameter)
    steps(trainer, trainer.steps_per_epoch + 2)
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(trainer.network.state_dict()[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def _as_the_network_gets_them(trainer: Trainer, step: int, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    random = generator(trainer.device, trainer.config.seed, "augment", step, 0)
    return trainer.normalise(augment(images, trainer.config.augment, random)), labels


def network_of(**keys: Any) -> nn.Module:
    return build_network(TrainConfig.model_validate(keys), channels=3, image_size=64, classes=5)


STAGES = {
    "convoy9": ["stem", "stage1", "stage2", "head"],
    "notes": ["0", "3", "8"],
    "resnet18": ["conv1", "layer1", "layer2", "layer3", "layer4"],
    "mobilenet_v3_small": [*(f"features.{number}" for number in range(13)), "classifier.0"],
    "convnext_tiny": [f"features.{number}" for number in range(8)],
    "regnet_y_400mf": ["stem", *(f"trunk_output.block{number}" for number in range(1, 5))],
}


@pytest.mark.parametrize("model", STAGES)
def test_stages_are_the_networks_own_parts_in_order_and_have_all_parameters_but_the_heads(
    model: str, digits: Packed
) -> None:
    network = network_of(model=model)
    stages = split_into_stages(network)
    assert [stage.name for stage in stages] == STAGES[model]
    *body, weight, bias = network.parameters()
    assert [id(parameter) for stage in stages for parameter in stage.parameters] == [id(each) for each in body]
    assert (weight.shape, bias.shape) == ((5, weight.shape[1]), (5,))


def test_rates_fall_by_a_factor_per_stage_and_the_head_has_its_own(digits: Packed) -> None:
    network = network_of(model="resnet18")
    config = TrainConfig.model_validate({"finetune": {"head_lr": 5, "layer_decay": 0.8}}).finetune
    factors = rate_factors(config, network)
    expected = {"conv1": 0.8**5, "bn1": 0.8**5, "layer1": 0.8**4, "layer2": 0.8**3, "layer3": 0.8**2, "layer4": 0.8}
    for name, parameter in network.named_parameters():
        assert factors[parameter] == pytest.approx(expected.get(name.partition(".")[0], 5.0))
    assert rate_factors(TrainConfig().finetune, network) == {}


def test_a_stage_that_does_not_exist_is_refused_with_those_that_do(trainer_of: Make) -> None:
    with pytest.raises(InputError, match=r"convoy9 has no stage 'stage3'; it has stem, stage1, stage2, head; `body`"):
        trainer_of({"freeze": "stage3"})
    with pytest.raises(ValueError, match="freeze_epochs"):
        trainer_of({"freeze": "body", "freeze_epochs": 0})


class Reversed(nn.Module):
    """Runs its second layer first."""

    def __init__(self) -> None:
        super().__init__()
        self.late, self.early, self.classify = nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3), nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classify(self.late(self.early(images)).flatten(1))
        return logits


def test_frozen_layers_behind_trained_ones_are_refused() -> None:
    images, config = torch.zeros(2, 1, 8, 8), TrainConfig.model_validate({"finetune": {"freeze": "late"}})
    with pytest.raises(InputError, match="runs frozen layers after trained ones"):
        check_finetuning(config, Reversed(), images)
    check_finetuning(TrainConfig.model_validate({"finetune": {"freeze": "body"}}), Reversed(), images)


def test_without_a_linear_layer_the_head_is_the_last_convolution(trainer_of: Make) -> None:
    trainer = trainer_of({"freeze": "body"}, model="squeezenet1_1", network={"stem": "small"})
    before = copied(trainer)
    steps(trainer, 1)
    assert changed(trainer, before) == {"classifier"}


def test_a_network_without_a_head_is_refused() -> None:
    config = TrainConfig.model_validate({"finetune": {"head_lr": 2}})
    with pytest.raises(InputError, match=r"^finetune.* and pretrained need a head: the network has no nn.Linear"):
        check_finetuning(config, nn.BatchNorm2d(1), torch.zeros(2, 1, 8, 8))


def test_parameters_that_the_network_itself_does_not_train_stay_so(digits: Packed) -> None:
    network = network_of()
    network.stem[0].weight.requires_grad_(False)
    freezing = Freezing(TrainConfig.model_validate({"finetune": {"freeze": "body"}}), network, steps_per_epoch=1)
    freezing.apply(frozen=True)
    freezing.apply(frozen=False)
    assert [name for name, each in network.named_parameters() if not each.requires_grad] == ["stem.0.weight"]
    assert all(module.training for module in network.modules())


def test_pretrained_weights_stay_in_the_frozen_body(trainer_of: Make, tmp_path: Path) -> None:
    save_weights(trainer_of({}, seed=5).network.state_dict(), tmp_path / "weights.safetensors")
    trainer = trainer_of({"freeze": "body"}, tmp_path / "weights.safetensors")
    before = copied(trainer_of({}, seed=5))
    steps(trainer, 2)
    assert changed(trainer, before) == {"linear"}


@pytest.mark.long
def test_ranks_and_interruptions_just_before_at_and_after_the_boundary_change_nothing(
    ranks: Ranks, digits: Packed
) -> None:
    finetune = {"freeze": "stage1", "freeze_epochs": 1, "head_lr": 3.0, "layer_decay": 0.7}
    keys = {"epochs": 2, "optimizer": "adam", "lr": 0.02, "ema": 0.9, "finetune": finetune}
    config = TrainConfig.model_validate(CONVOY9 | keys)
    boundary = digits.manifest.splits["train"].count // 64
    stops = [boundary - 4, boundary - 3, boundary - 2, boundary - 1, boundary]  # the ranks agree some steps later
    (alone,), two, four, (resumed,) = ranks.train(
        digits,
        config,
        1,
        2,
        4,
        ",".join(f"{size}@{stop}" for size, stop in zip((2, 1, 4, 2, 1), stops, strict=True)) + ",1",
    )
    assert resumed == alone
    for each in (*two, *four):
        assert each["weights"] == alone["weights"]
        assert (each["steps"], each["epochs"]) == (alone["steps"], alone["epochs"])


@pytest.mark.parametrize(
    ("optimizer", "state"), [("sgd", "momentum_buffer"), ("adam", "exp_avg"), ("muon", "momentum_buffer")]
)
def test_a_checkpoint_of_any_step_around_the_boundary_continues_in_the_same_way(
    optimizer: str, state: str, trainer_of: Make
) -> None:
    keys: dict[str, Any] = {"finetune": {"freeze": "body", "freeze_epochs": 1}, "optimizer": optimizer, "lr": 0.02}
    undisturbed = trainer_of(**keys)
    boundary = undisturbed.steps_per_epoch
    states = {}
    for step in range(boundary + 3):
        if step >= boundary - 1:
            list(undisturbed.reports.until(step))
            states[step] = take_state(undisturbed)
        undisturbed.train_step()
    list(undisturbed.reports.until(undisturbed.step))
    expected = weights_sha256(take_state(undisturbed))
    with_body = {step for step, tensors in states.items() if f"optimizer/stem.0.weight/{state}" in tensors}
    assert with_body == {boundary + 1, boundary + 2}
    for tensors in states.values():
        again = trainer_of(**keys)
        restore(again, tensors)
        steps(again, boundary + 3 - again.step)
        assert weights_sha256(take_state(again)) == expected


FEATURES: dict[str, Any] = {
    "finetune": {"freeze": "body"},
    "augment": {"flip": False, "shift": 0},
    "optimizer": "adam",
    "lr": 0.05,
}


def test_features_of_a_frozen_body_are_computed_once_and_the_head_learns_as_it_would_on_images(
    trainer_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = trainer_of(**FEATURES, lanes=4)
    runs = []
    once.network.stem.register_forward_hook(lambda *_: runs.append(1))
    steps(once, once.steps_per_epoch + 1)
    assert once.train_split.shape == (16, 1, 1)
    monkeypatch.setattr("cnn.training.trainer.wants_features", lambda *_: False)
    images = trainer_of(**FEATURES, lanes=4)
    before = copied(images)
    steps(images, images.steps_per_epoch + 1)
    assert changed(once, before) == changed(images, before) == {"linear"}
    for name, tensor in images.network.state_dict().items():
        torch.testing.assert_close(once.network.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    ours, theirs = once.validate(), images.validate()
    assert (ours.loss, ours.accuracy) == pytest.approx((theirs.loss, theirs.accuracy), rel=1e-4)
    assert not runs


@pytest.mark.long
def test_ranks_and_interruptions_change_nothing_where_features_are_computed_once(ranks: Ranks, digits: Packed) -> None:
    config = TrainConfig.model_validate(CONVOY9 | FEATURES | {"epochs": 2, "ema": 0.9, "select": "best"})
    (alone,), two, four, (resumed,) = ranks.train(digits, config, 1, 2, 4, "2@5,4@30,1")
    assert resumed == alone
    assert alone["steps"][-1]["loss"] < alone["steps"][0]["loss"]
    for each in (*two, *four):
        assert each["weights"] == alone["weights"]
        assert (each["steps"], each["epochs"]) == (alone["steps"], alone["epochs"])


@pytest.mark.parametrize(
    "change",
    [
        {"augment": {"flip": False, "shift": 1}},
        {"augment": {"flip": False, "shift": 0, "mixup": 0.2}},
        {"finetune": {"freeze": "head"}},
        {"finetune": {"freeze": "body", "freeze_epochs": 1}},
        {"test_flip": True},
    ],
)
def test_images_are_used_where_features_would_differ_between_epochs(change: dict[str, Any], trainer_of: Make) -> None:
    assert trainer_of(**FEATURES | change).train_split.shape == (1, 8, 8)


def test_images_are_used_where_features_would_take_too_much_memory(
    trainer_of: Make, digits: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    bytes_needed = sum(digits.manifest.splits[name].count for name in ("train", "val")) * 16 * 4
    monkeypatch.setattr("cnn.training.features.MAX_BYTES", bytes_needed)
    assert trainer_of(**FEATURES).train_split.shape == (16, 1, 1)
    monkeypatch.setattr("cnn.training.features.MAX_BYTES", bytes_needed - 1)
    assert trainer_of(**FEATURES).train_split.shape == (1, 8, 8)


class Dropping(nn.Module):
    """Drops features by a function, as timm's networks do; or between frozen layers."""

    def __init__(self, *, early: float = 0.0, late: float = 0.0) -> None:
        super().__init__()
        self.early, self.drop_rate = early, late
        self.conv, self.fc = nn.Conv2d(1, 32, 3), nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.conv(nn.functional.dropout(images, self.early, self.training)).mean((2, 3))
        logits: Tensor = self.fc(nn.functional.dropout(maps, self.drop_rate, self.training))
        return logits


class Parts(Dropping):
    """Has a head for parts of images, whose logits are averaged."""

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.conv(images).flatten(2).mT).mean(1)
        return logits


def test_dropout_before_the_head_is_found_and_what_is_random_before_that_is_noticed(digits: Packed) -> None:
    def found(network: nn.Module, shape: tuple[int, int, int] = (1, 8, 8)) -> float | None:
        config = TrainConfig.model_validate({"finetune": {"freeze": "body"}})
        Freezing(config, network, steps_per_epoch=1).apply(frozen=True)
        return dropout_before_head(network, Normalise((0.5,), (0.2,)), shape)

    assert found(Dropping()) == 0.0
    assert found(Dropping(late=0.3)) == 0.3
    assert found(Dropping(early=0.1, late=0.3)) is None
    assert found(Parts()) is None
    assert found(network_of(model="mobilenet_v3_small"), (3, 64, 64)) == 0.2
    assert found(network_of(model="resnet18"), (3, 64, 64)) == 0.0
