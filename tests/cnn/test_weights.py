"""Weights as files, and the digest that names their values."""

import copy
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cnn.config.training import TrainConfig
from cnn.errors import InputError
from cnn.networks.build import build_network
from cnn.networks.weights import (
    head_name,
    in_order_of,
    load_pretrained,
    load_weights,
    read_pth,
    save_weights,
    weights_sha256,
)

State = dict[str, Tensor]


def network(seed: int = 0, channels: int = 1, classes: int = 10, **options: object) -> nn.Module:
    torch.manual_seed(seed)
    config = TrainConfig.model_validate({"network": {"width": 4}, **options})
    return build_network(config, channels=channels, image_size=8, classes=classes)


@pytest.fixture
def state() -> State:
    return {name: tensor.clone() for name, tensor in network().state_dict().items()}


def test_weights_come_back_from_a_file_with_the_digest_that_saving_gave(tmp_path: Path) -> None:
    digest = save_weights(network().state_dict(), tmp_path / "model.safetensors")
    loaded = load_weights(network(seed=1), tmp_path / "model.safetensors")
    assert weights_sha256(loaded.state_dict()) == digest == weights_sha256(network().state_dict())


def test_file_holds_plain_names_and_a_digest_for_everybody_to_recompute(tmp_path: Path) -> None:
    digest = save_weights(network().state_dict(), tmp_path / "model.safetensors")
    held = load_file(tmp_path / "model.safetensors")
    assert held.keys() == network().state_dict().keys()
    assert weights_sha256(held) == digest


def test_digest_depends_neither_on_the_order_nor_on_the_layout_in_memory_or_file(state: State, tmp_path: Path) -> None:
    digest = weights_sha256(state)
    assert weights_sha256(dict(reversed(state.items()))) == digest
    channels_last = network().to(memory_format=torch.channels_last)
    assert weights_sha256(channels_last.state_dict()) == digest
    assert save_weights(channels_last.state_dict(), tmp_path / "channels-last.safetensors") == digest
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
    save_weights(network().state_dict(), tmp_path / "model.safetensors")
    wider = build_network(TrainConfig.model_validate({"network": {"width": 8}}), channels=1, image_size=8, classes=10)
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_weights(wider, tmp_path / "model.safetensors")


STEM = "stem.0.weight"


def pretrained(path: Path, **options: object) -> Path:
    """A file as another training leaves it."""
    save_weights(network(seed=1, **options).state_dict(), path / "pretrained.safetensors")
    return path / "pretrained.safetensors"


def test_pretrained_weights_of_the_same_network_are_all_taken(tmp_path: Path) -> None:
    fresh = network().to(memory_format=torch.channels_last)
    assert load_pretrained(fresh, pretrained(tmp_path)) == ()
    assert weights_sha256(fresh.state_dict()) == weights_sha256(network(seed=1).state_dict())
    assert fresh.stage1[0][0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.long
@pytest.mark.parametrize(
    ("there", "here", "left"),
    [
        ({"classes": 3}, {}, ("linear.weight", "linear.bias")),
        ({"channels": 1}, {"channels": 3}, (STEM,)),
        ({"channels": 4}, {"channels": 1}, (STEM,)),
        ({"classes": 3, "channels": 1}, {"channels": 3}, (STEM, "linear.weight", "linear.bias")),
        (
            {"model": "resnet18", "network": {}, "classes": 5},
            {"model": "resnet18", "network": {}},
            ("fc.weight", "fc.bias"),
        ),
        (
            {"model": "squeezenet1_1", "network": {}, "classes": 5},
            {"model": "squeezenet1_1", "network": {}},
            ("classifier.1.weight", "classifier.1.bias"),
        ),
    ],
    ids=["classes", "more channels", "fewer channels", "both", "torchvision", "head is a convolution"],
)
def test_what_is_of_other_classes_or_channels_stays_fresh_and_is_named(
    there: dict[str, object], here: dict[str, object], left: tuple[str, ...], tmp_path: Path
) -> None:
    ours, fresh, theirs = network(**here), network(**here).state_dict(), network(seed=1, **there).state_dict()
    file = pretrained(tmp_path, **there)
    torch.manual_seed(7)
    assert load_pretrained(ours, file) == left
    if "classes" in there:  # a new head is as PyTorch makes one, however the network began
        head = copy.deepcopy(ours.get_submodule(head_name(ours)))
        torch.manual_seed(7)
        head.reset_parameters()  # type: ignore[operator]
        assert cast(Tensor, head.weight).abs().max() <= cast(Tensor, head.weight)[0].numel() ** -0.5
        fresh |= {f"{head_name(ours)}.{name}": tensor for name, tensor in head.state_dict().items()}
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, (fresh if name in left else theirs)[name])


def test_grey_images_give_what_they_would_give_as_rgb(tmp_path: Path) -> None:
    grey, rgb = network(), network(seed=1, channels=3)
    assert load_pretrained(grey, pretrained(tmp_path, channels=3)) == ()
    images = torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(grey(images), rgb(images.expand(-1, 3, -1, -1)), atol=1e-4, rtol=1e-4)


def test_pretrained_weights_may_be_of_lower_precision_and_without_step_counters(tmp_path: Path) -> None:
    state = {n: t.half() for n, t in network(seed=1).state_dict().items() if not n.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "half.safetensors")
    ours = network()
    assert load_pretrained(ours, tmp_path / "half.safetensors") == ()
    assert torch.equal(ours.linear.weight, state["linear.weight"].float())


Change = Callable[[State], State]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda state: {name.replace("linear.", "fc."): tensor for name, tensor in state.items()},
            r"48 of 50 names match; there is no 'linear.weight' in it, the nearest is 'fc.weight'",
        ),
        (
            lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
            r"0 of 50 names match; there is no 'stem.0.weight' in it, the nearest is 'module.stem.0.weight'",
        ),
        (lambda state: {}, r"0 of 50 names match; there is no 'stem.0.weight' in it$"),
        (
            lambda state: state | {"linear2.weight": torch.zeros(1)},
            r"50 of 50 names match; there is no 'linear2.weight' here, the nearest is 'linear.weight'",
        ),
        (
            lambda state: state | {"head.0.weight": torch.zeros(16, 16, 5, 5)},
            r"head.0.weight is 16×16×5×5 in the file, but 16×16×3×3 here; set the network's options",
        ),
        (
            lambda state: state | {STEM: torch.zeros(4, 3, 7, 7)},
            r"stem.0.weight is 4×3×7×7 in .* 4×1×3×3 here",
        ),
        (
            lambda state: state | {"linear.weight": torch.zeros(10, 8)},
            r"linear.weight is 10×8 in .* 10×16 here",
        ),
    ],
    ids=["other names", "prefix", "empty", "one more", "other kernel", "other stem", "other features"],
)
def test_weights_of_another_network_are_refused_and_change_nothing(
    change: Change, complaint: str, state: State, tmp_path: Path
) -> None:
    ours = network(seed=1)
    save_file(change(state), tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=complaint):
        load_pretrained(ours, tmp_path / "other.safetensors")
    assert weights_sha256(ours.state_dict()) == weights_sha256(network(seed=1).state_dict())


@pytest.mark.long
def test_a_deeper_network_is_another_network_though_it_has_all_names(tmp_path: Path) -> None:
    deeper = pretrained(tmp_path, model="resnet34", network={})
    with pytest.raises(InputError, match=r"122 of 122 names match; there is no 'layer1.2"):
        load_pretrained(network(model="resnet18", network={}), deeper)


@pytest.mark.parametrize("content", [None, b"not weights"], ids=["no file", "another format"])
def test_an_unreadable_file_is_named(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    if content:
        file.write_bytes(content)
    with pytest.raises(InputError, match=r"weights\.safetensors cannot be read as a safetensors file"):
        load_pretrained(network(), file)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before PyTorch 1.6"])
def test_a_file_of_pytorch_gives_its_tensors_in_order_whatever_their_layout(zipped: bool, tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    held = {"b": nn.Parameter(shared.view(2, 3).t()), "a": shared[1:], "c": torch.tensor(3)}
    torch.save(held, tmp_path / "held.pth", _use_new_zipfile_serialization=zipped)
    found = read_pth(tmp_path / "held.pth", "held.pth")
    assert [*found] == ["b", "a", "c"]
    assert all(torch.equal(found[name], held[name]) and found[name].is_contiguous() for name in held)
    save_weights(found, tmp_path / "held.safetensors")
    assert load_file(tmp_path / "held.safetensors").keys() == held.keys()


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("made",)


@pytest.mark.parametrize(
    ("held", "complaint"),
    [
        (
            {"a": Hostile()},
            r"^it\.pth is refused: to read it, posix\.mkdir would have to be called; give names and tensors",
        ),
        (nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear would have to be called"),
        (
            {"state_dict": {"a": torch.ones(1)}},
            r"holds an object of type dict under 'state_dict', where only dense tensors",
        ),
        ({"a": 1}, r"holds an object of type int under 'a'"),
        ({1: torch.ones(1)}, r"under 1, where only"),
        ({"a": torch.ones(2).to_sparse()}, r"under 'a', where only dense tensors are read"),
        ({"a": torch.ones(2, device="meta")}, r"under 'a', where only dense tensors are read"),
        ([torch.ones(1)], r"holds an object of type list, not a mapping of names to tensors"),
        ({}, r"not a mapping of names to tensors"),
    ],
    ids=["hostile", "module", "nested", "number", "unnamed", "sparse", "meta", "list", "empty"],
)
def test_a_file_of_pytorch_with_anything_but_names_and_tensors_is_refused(
    held: object, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(held, "it.pth")
    with pytest.raises(InputError, match=complaint) as refusal:
        read_pth(Path("it.pth"), "it.pth")
    assert "\n" not in str(refusal.value) and not Path("made").exists()


@pytest.mark.parametrize(
    "content", [b"", b"<html>", pickle.dumps(Hostile()), b"PK\x03\x04"], ids=["empty", "page", "pickle", "cut"]
)
def test_what_is_no_file_of_pytorch_is_refused(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("it.pth").write_bytes(content)
    with pytest.raises(InputError, match=r"^it\.pth (is damaged, or is not a file of tensors|is refused)"):
        read_pth(Path("it.pth"), "it.pth")
    assert not Path("made").exists()


def test_tensors_with_other_names_are_taken_in_order_if_their_number_is_right(state: State) -> None:
    others = {f"theirs.{number}": tensor for number, tensor in enumerate(state.values())}
    assert weights_sha256(in_order_of(network(seed=1), others, "x.pth")) == weights_sha256(state)
    others.popitem()
    with pytest.raises(InputError, match=rf"x\.pth is of another network: it holds {len(state) - 1} tensors, the"):
        in_order_of(network(), others, "x.pth")
