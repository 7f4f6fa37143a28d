"""The number of ranks does not change the result: real processes over gloo, real digits."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cnn.config.training import TrainConfig
from cnn.distributed.lanes import Exchange, PartialSums
from cnn.distributed.process_group import EXCHANGE_TIMEOUT, check_devices, process_group
from cnn.distributed.world_size import check_world_size, default_world_size
from cnn.errors import InputError
from tests.cnn.conftest import Packed, Ranks

RECIPES: dict[str, dict[str, Any]] = {
    "notes": {
        "model": "notes",
        "network": {"channels": [8, 16], "pool_stride": 1, "dropout": 0.3},
        "optimizer": "adamw",
        "lr": 0.002,
        "augment": {"shift": 1, "mixup": 0.4},
    },
    "convoy9": {
        "model": "convoy9",
        "network": {"width": 8, "dropout": 0.2},
        "augment": {"shift": 1, "cutout": 2, "cutmix": 1.0},
        "ema": 0.9,
        "clip_norm": 2.0,
        "select": "best",
        "test_flip": True,
    },
    "convoy9 augmented, of balanced classes": {
        "model": "convoy9",
        "network": {"width": 8},
        "augment": {
            **{"flip": False, "shift": 0, "crop_area": 0.7, "rotation": 10, "brightness": 0.3, "contrast": 0.3},
            **{"erase": 0.2, "policy": "trivial"},
        },
        "sampling": "balanced",
    },
    "convoy9 in bfloat16": {
        "model": "convoy9",
        "network": {"width": 4},
        "precision": "bfloat16",
        "optimizer": "adam",
        "lr": 0.01,
    },
    "convoy9 by Muon in bfloat16": {
        "model": "convoy9",
        "network": {"width": 4, "stem_width": 4, "stem_kernel": 2},
        "precision": "bfloat16",
        "optimizer": "muon",
        "lr": 0.05,
        "weight_decay": 0.02,
        "select": "best",
        "validate_every": 2,
    },
}


FAILING_RANK = """
import os, sys
import torch.distributed as dist
from cnn.distributed.process_group import process_group
os.environ |= {"RANK": sys.argv[2], "WORLD_SIZE": "2", "LOCAL_RANK": sys.argv[2], "GLOO_SOCKET_IFNAME": "lo"}
try:
    with process_group(dist.FileStore(sys.argv[1], 2)):
        raise ValueError("on purpose")
except ValueError:
    print(dist.is_initialized(), flush=True)
    os._exit(1)
"""


@pytest.mark.long
def test_a_rank_that_fails_destroys_nothing_that_would_wait_for_the_others(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", FAILING_RANK, str(tmp_path / "meeting"), str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    assert [rank.communicate(timeout=60)[0] for rank in ranks] == ["True\n", "True\n"]


def test_an_error_of_a_single_process_leaves_no_group() -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="on purpose"), process_group():
            raise ValueError("on purpose")
    assert not dist.is_initialized()


def test_ranks_that_wait_for_one_that_is_cut_off_give_up_when_the_exchange_times_out() -> None:
    with process_group() as (_, exchange):
        assert exchange._group
        assert exchange._group._get_backend(torch.device("cpu")).options._timeout == EXCHANGE_TIMEOUT


@pytest.mark.parametrize("recipe", RECIPES)
def test_weights_and_metrics_are_equal_bit_for_bit_for_1_2_and_4_ranks(
    recipe: str, ranks: Ranks, digits: Packed
) -> None:
    config = TrainConfig(epochs=2, batch_size=64, lanes=4, **RECIPES[recipe])
    (alone,), two, four = ranks.train(digits, config, 1, 2, 4)
    assert len(alone["steps"]) == 2 * (digits.manifest.splits["train"].count // 64)
    assert alone["steps"][-1]["loss"] < alone["steps"][0]["loss"]
    for each in (*two, *four):
        assert each["weights"] == alone["weights"]
        assert (each["steps"], each["epochs"]) == (alone["steps"], alone["epochs"])
    assert two[0]["state"] == four[0]["state"] == alone["state"]


BOTH = {"drop_rate": 0.2, "drop_path_rate": 0.2}
FAMILIES: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "resnext50_32x4d": {},
    "mobilenet_v2": {},
    "mobilenet_v3_small": {},
    "efficientnet_b0": {},
    "efficientnet_v2_s": {},
    "convnext_tiny": {},
    "regnet_y_400mf": {},
    "shufflenet_v2_x1_0": {},
    "densenet121": {},
    "mnasnet0_5": {},
    "swin_t": {},
    "efficientnet_lite0": BOTH,
    "timm/resnet18d": BOTH,
    "timm/mobilenetv3_small_050": BOTH,
    "timm/mobilenetv4_conv_small_035": BOTH,
    "timm/regnetx_002": BOTH,
    "timm/repvgg_a0": BOTH,
    "timm/eca_nfnet_l0": BOTH,
    "timm/densenet121": {"drop_rate": 0.2},
    "timm/ghostnet_050": {"drop_rate": 0.2},
}
"""Networks of libraries, one or more per family that takes 8×8 pixels, with their options."""


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_network_of_each_family_too(name: str, ranks: Ranks, digits: Packed) -> None:
    config = TrainConfig(model=name, network=FAMILIES[name], epochs=1, batch_size=256, lanes=4, lr=0.01, ema=0.5)
    (alone,), two = ranks.train(digits, config, 1, 2)
    assert alone["steps"][0]["loss"] != alone["steps"][-1]["loss"]
    assert [rank["weights"] for rank in two] == [alone["weights"]] * 2


@pytest.mark.long
def test_eight_lanes_give_the_same_to_1_2_4_and_8_ranks(ranks: Ranks, digits: Packed) -> None:
    config = TrainConfig(epochs=1, batch_size=64, lanes=8, **RECIPES["convoy9"])
    plans = ranks.train(digits, config, 1, 2, 4, 8)
    assert len({rank["weights"] for plan in plans for rank in plan}) == 1


@pytest.mark.long
@pytest.mark.parametrize(
    "recipe", ["notes", "convoy9", "convoy9 augmented, of balanced classes", "convoy9 by Muon in bfloat16"]
)
def test_stopped_and_resumed_in_mid_epoch_by_other_numbers_of_ranks_nothing_differs(
    recipe: str, ranks: Ranks, digits: Packed
) -> None:
    config = TrainConfig(epochs=3, batch_size=64, lanes=4, **RECIPES[recipe])
    per_epoch = digits.manifest.splits["train"].count // 64
    (undisturbed,), (resumed,), four = ranks.train(
        digits, config, 1, f"2@5,4@{per_epoch - 2},2@{2 * per_epoch + 3},1", "1@9,4"
    )
    assert resumed == undisturbed
    assert four[0] == undisturbed


@pytest.mark.long
@pytest.mark.parametrize("window", [300, pytest.param(None, marks=pytest.mark.slow)])
def test_where_the_shards_are_changes_nothing_nor_does_an_interruption_with_a_window(
    window: int | None, ranks: Ranks, many_shards: Packed
) -> None:
    config = TrainConfig(epochs=2, batch_size=64, lanes=4, shuffle_window=window, **RECIPES["convoy9"])
    ((mapped,),) = ranks.train(many_shards, config, 1)
    (alone,), two, four, (resumed,) = ranks.train(many_shards, config, 1, 2, 4, "2@5,4@30,1", reader="streamed")
    assert alone == resumed == mapped
    for each in (*two, *four):
        assert each["weights"] == mapped["weights"]
        assert (each["steps"], each["epochs"]) == (mapped["steps"], mapped["epochs"])


@pytest.mark.long
def test_another_seed_or_number_of_lanes_gives_other_weights(ranks: Ranks, digits: Packed) -> None:
    config = TrainConfig(epochs=1, batch_size=64, lanes=4, **RECIPES["notes"])
    changed = [config, config.model_copy(update={"seed": 1}), config.model_copy(update={"lanes": 2})]
    assert len({ranks.train(digits, each, 1)[0][0]["weights"] for each in changed}) == 3


@pytest.mark.parametrize("leaves", [1, 2, 4, 8, 16])
def test_partial_sums_add_along_the_balanced_tree(leaves: int) -> None:
    values = torch.rand(leaves, 5, generator=torch.Generator().manual_seed(1)) * 10 ** torch.arange(5)

    def tree(part: torch.Tensor) -> torch.Tensor:
        half = len(part) // 2
        return part[0] if half == 0 else tree(part[:half]) + tree(part[half:])

    sums = PartialSums()
    for value in values:
        sums.push([value.clone()])
    assert torch.equal(sums.pop_total()[0], tree(values))

    for value in values[:-1]:
        sums.push([value.clone()])
    last = values[-1].clone()
    sums.fold_into(0, last)
    assert torch.equal(last, tree(values))


@pytest.mark.long
def test_2_4_and_8_ranks_add_vectors_of_any_size_along_the_balanced_tree(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.cnn.sum_program", str(tmp_path), "2", "4", "8"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    assert subprocess.run(command, env=environment, timeout=100).returncode == 0


def test_ranks_that_cannot_share_the_lanes_are_refused_with_the_nearest_that_can() -> None:
    for fits in (1, 2, 4, 8):
        check_world_size(8, fits)
    with pytest.raises(InputError, match="nearest are 2 and 4"):
        check_world_size(8, 3)
    with pytest.raises(InputError, match="nearest is 8"):
        check_world_size(8, 16)


def test_more_ranks_than_gpus_are_refused_but_ranks_may_share_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    check_devices(1000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_devices(2)
    with pytest.raises(InputError, match=r"^4 ranks need a GPU each, and this machine has 2; set ranks to at most 2"):
        check_devices(4)


def test_default_world_size_is_the_largest_that_has_devices_and_shares_the_lanes() -> None:
    assert [default_world_size(8, devices) for devices in (0, 1, 2, 3, 6, 8, 64)] == [1, 1, 2, 2, 4, 8, 8]


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


def test_on_a_gpu_a_stream_of_its_own_waits_for_the_gradient_and_the_callers_waits_for_the_sum_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is queued, in which order and on which stream; what a GPU makes of it can be seen on one only."""
    events: list[str] = []
    on = ["compute"]

    class Stream:
        def wait_stream(self, other: str) -> None:
            events.append(f"side waits for {other}")

    class Entered:
        def __init__(self, _: Stream) -> None: ...

        def __enter__(self) -> None:
            on.append("side")

        def __exit__(self, *_: object) -> None:
            on.pop()

    class Future:
        def __init__(self, devices: list[torch.device]) -> None: ...

        def set_result(self, _: torch.Tensor) -> None:  # records an event on the current stream
            events.append(f"done on {on[-1]}")

        def wait(self) -> None:
            events.append(f"{on[-1]} waits for it")

    monkeypatch.setattr("torch.cuda.Stream", lambda _: Stream())
    monkeypatch.setattr("torch.cuda.current_stream", lambda _: on[-1])
    monkeypatch.setattr("torch.cuda.stream", Entered)
    monkeypatch.setattr("cnn.distributed.lanes.Future", Future)
    exchange = Exchange(None)
    exchange.world_size = 2
    monkeypatch.setattr(exchange, "_sum", lambda tensor: events.append(f"summed on {on[-1]}") or tensor)
    future = exchange.submit(torch.zeros(1).as_subclass(OnGpu), lambda: events.append(f"folded on {on[-1]}"))
    events.append("backward goes on")
    future.wait()
    exchange.close()
    assert events == [
        *("side waits for compute", "folded on side", "summed on side", "done on side"),
        *("backward goes on", "compute waits for it"),
    ]
