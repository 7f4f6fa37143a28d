"""Weights as files, and the digest that names their values."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cnn.config import TrainConfig
from cnn.networks import build_network
from cnn.weights import load_weights, save_weights, weights_sha256

State = dict[str, Tensor]


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = TrainConfig.model_validate({"network": {"width": 4}})
    return build_network(config, channels=1, image_size=8, classes=10)


@pytest.fixture
def state() -> State:
    return {name: tensor.clone() for name, tensor in network().state_dict().items()}


def test_weights_come_back_from_a_file_with_the_digest_that_saving_gave(tmp_path: Path) -> None:
    digest = save_weights(network(), tmp_path / "model.safetensors")
    loaded = load_weights(network(seed=1), tmp_path / "model.safetensors")
    assert weights_sha256(loaded.state_dict()) == digest == weights_sha256(network().state_dict())


def test_file_holds_plain_names_and_a_digest_for_everybody_to_recompute(tmp_path: Path) -> None:
    digest = save_weights(network(), tmp_path / "model.safetensors")
    held = load_file(tmp_path / "model.safetensors")
    assert held.keys() == network().state_dict().keys()
    assert weights_sha256(held) == digest


def test_digest_depends_neither_on_the_order_nor_on_the_layout_in_memory_or_file(state: State, tmp_path: Path) -> None:
    digest = weights_sha256(state)
    assert weights_sha256(dict(reversed(state.items()))) == digest
    channels_last = network().to(memory_format=torch.channels_last)
    assert weights_sha256(channels_last.state_dict()) == digest
    assert save_weights(channels_last, tmp_path / "channels-last.safetensors") == digest
    save_file(state, tmp_path / "other.safetensors", metadata={"format": "pt", "note": "another header"})
    assert weights_sha256(load_file(tmp_path / "other.safetensors")) == digest


def test_digest_changes_with_any_one_tensor(state: State) -> None:
    digests = {weights_sha256(state)}
    for name, tensor in state.items():
        changed = torch.nextafter(tensor, tensor + 1) if tensor.is_floating_point() else tensor + 1
        digests.add(weights_sha256({**state, name: changed}))
    assert len(digests) == 1 + len(state)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state | {"extra": torch.zeros(1)},
        lambda state: {name: tensor for name, tensor in state.items() if name != "linear.bias"},
        lambda state: {name.replace("linear.bias", "linear.scale"): tensor for name, tensor in state.items()},
        lambda state: state | {"linear.weight": state["linear.weight"].T.contiguous()},
        lambda state: state | {"linear.weight": state["linear.weight"].reshape(-1)},
        lambda state: state | {"linear.bias": state["linear.bias"].view(torch.int32)},
    ],
    ids=["one more", "one less", "another name", "transposed", "another shape", "another dtype"],
)
def test_digest_covers_names_shapes_and_dtypes(state: State, change: Callable[[State], State]) -> None:
    assert weights_sha256(change(state)) != weights_sha256(state)


def test_scalars_and_empty_tensors_have_a_digest() -> None:
    assert weights_sha256({"a": torch.tensor(3)}) != weights_sha256({"a": torch.tensor(4)})
    assert weights_sha256({"a": torch.empty(0)}) != weights_sha256({"b": torch.empty(0)})


def test_loading_into_another_structure_is_refused(tmp_path: Path) -> None:
    save_weights(network(), tmp_path / "model.safetensors")
    wider = build_network(TrainConfig.model_validate({"network": {"width": 8}}), channels=1, image_size=8, classes=10)
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_weights(wider, tmp_path / "model.safetensors")
