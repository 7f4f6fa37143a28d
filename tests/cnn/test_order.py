"""The order of the training images: the same for every number of ranks, complete, and as well mixed as is said."""

import pytest
import torch
from torch import Tensor

from cnn.config.training import TrainConfig
from cnn.data.manifest import Shard, SplitInfo
from cnn.errors import InputError
from cnn.training.order import DEFAULT_WINDOW_BYTES, MAX_PERMUTED_BYTES, Order, mixing, shuffle_window
from cnn.training.random_streams import epoch_order

SIZES = (700, 300, 1, 999, 500) * 8  # images a shard


def made_split(*counts: int, image_bytes: int = 1000) -> SplitInfo:
    shards = tuple(Shard(sha256=f"{i:064x}", count=count, bytes=count * image_bytes) for i, count in enumerate(counts))
    return SplitInfo(count=sum(counts), class_counts=(sum(counts),), shards=shards)


def config(**keys: object) -> TrainConfig:
    return TrainConfig.model_validate({"batch_size": 64, "lanes": 4} | keys)


def shards_of(split: SplitInfo, order: Tensor) -> Tensor:
    ends = torch.tensor([shard.count for shard in split.shards]).cumsum(0)
    return torch.searchsorted(ends, order, right=True)


def test_without_a_window_it_is_one_permutation_cut_into_batches_and_lanes() -> None:
    split = made_split(*SIZES)
    made = Order(config(seed=3), split).epoch(5, range(4))
    expected = epoch_order(3, 5, split.count)
    assert made.shape == (split.count // 64, 4, 16)
    for step in (0, 17, len(made) - 1):
        assert torch.equal(made[step], expected[step * 64 : (step + 1) * 64].view(4, 16))


@pytest.mark.parametrize("window", [None, 1, 500, 5_000, 19_999], ids=str)
def test_every_image_comes_once_but_those_that_fill_no_batch(window: int | None) -> None:
    split = made_split(*SIZES)
    order = Order(config(shuffle_window=window), split)
    left_out = set()
    for epoch in range(2):
        made = order.epoch(epoch, range(4)).flatten()
        assert len(made) == split.count // 64 * 64 == len(made.unique())
        assert int(made.min()) >= 0 and int(made.max()) < split.count
        left_out.add(tuple(sorted(set(range(split.count)) - set(made.tolist()))))
    assert len(left_out) == 2


@pytest.mark.parametrize("window", [None, 2_000])
def test_a_lane_has_the_same_images_whichever_others_are_with_it(window: int | None) -> None:
    order = Order(config(shuffle_window=window), made_split(*SIZES))
    whole = order.epoch(1, range(4))
    for world_size in (1, 2, 4):
        per_rank = 4 // world_size
        parts = [order.epoch(1, range(r * per_rank, (r + 1) * per_rank)) for r in range(world_size)]
        assert torch.equal(torch.cat(parts, dim=1), whole)


def test_it_depends_on_seed_epoch_window_and_counts_only() -> None:
    split = made_split(*SIZES)
    base = Order(config(shuffle_window=2_000), split).epoch(0, range(4))
    assert torch.equal(base, Order(config(shuffle_window=2_000, lr=0.1), split).epoch(0, range(4)))
    renamed = split.model_copy(
        update={"shards": tuple(s.model_copy(update={"sha256": "a" * 64}) for s in split.shards)}
    )
    assert torch.equal(base, Order(config(shuffle_window=2_000), renamed).epoch(0, range(4)))
    torch.manual_seed(99)  # no global state plays a part
    assert torch.equal(base, Order(config(shuffle_window=2_000), split).epoch(0, range(4)))
    others = [
        Order(config(shuffle_window=2_000), split).epoch(1, range(4)),
        Order(config(shuffle_window=2_000, seed=1), split).epoch(0, range(4)),
        Order(config(shuffle_window=2_400), split).epoch(0, range(4)),
    ]
    assert not any(torch.equal(base, other) for other in others)


def balanced(*counts: int, seed: int = 0, **keys: object) -> tuple[Order, Tensor]:
    """The order and the labels of classes of these sizes, mixed."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(9))]
    split = made_split(sum(counts)).model_copy(update={"class_counts": counts})
    return Order(config(sampling="balanced", seed=seed, **keys), split, lambda: labels), labels


def test_balanced_classes_come_equally_often_and_their_images_in_turn() -> None:
    counts = (900, 70, 1, 0, 129)  # 1 100 images: 17 steps of 64
    order, labels = balanced(*counts)
    assert order.steps_per_epoch == 17
    seen = torch.zeros(len(labels), dtype=torch.int64)
    for epoch in range(9):
        made = order.epoch(epoch, range(4))
        assert made.shape == (17, 4, 16)
        found = torch.bincount(labels[made.flatten()], minlength=5)
        assert found[3] == 0 and int(found.sum()) == 17 * 64
        assert int(found[[0, 1, 2, 4]].max() - found[[0, 1, 2, 4]].min()) <= 1
        seen += torch.bincount(made.flatten(), minlength=len(labels))
        totals = torch.bincount(labels, weights=seen.double(), minlength=5)
        assert float(totals[[0, 1, 2, 4]].max() - totals[[0, 1, 2, 4]].min()) <= 1
        for label in (0, 1, 2, 4):  # over all epochs, no image comes twice more often than another of its class
            assert int(seen[labels == label].max() - seen[labels == label].min()) <= 1


def test_the_classes_of_balanced_batches_are_mixed_as_at_random() -> None:
    order, labels = balanced(5_000, 500, 300, 200)
    batches = labels[order.epoch(0, range(4))].flatten(1)  # steps, images
    shares = torch.stack([(batches == label).double().mean(1) for label in range(4)])
    assert torch.allclose(shares.mean(1), torch.full((4,), 0.25, dtype=torch.float64), atol=1e-3)
    assert float(shares.var(1).mean()) == pytest.approx(0.25 * 0.75 / 64, rel=0.25)


def test_balanced_order_depends_on_seed_epoch_and_labels_only() -> None:
    base, _ = balanced(500, 30, 7)
    whole = base.epoch(2, range(4))
    for world_size in (1, 2, 4):
        parts = [base.epoch(2, range(r * 4 // world_size, (r + 1) * 4 // world_size)) for r in range(world_size)]
        assert torch.equal(torch.cat(parts, dim=1), whole)
    torch.manual_seed(99)
    assert torch.equal(balanced(500, 30, 7)[0].epoch(2, range(4)), whole)
    others = [base.epoch(1, range(4)), balanced(500, 30, 7, seed=1)[0].epoch(2, range(4))]
    assert not any(torch.equal(whole, other) for other in others)


def test_more_classes_than_places_in_an_epoch_take_turns_over_epochs() -> None:
    order, _ = balanced(*[1] * 100)  # one step of 64
    seen = sum(torch.bincount(order.epoch(epoch, range(4)).flatten(), minlength=100) for epoch in range(25))
    assert isinstance(seen, Tensor) and seen.tolist() == [16] * 100


def test_balanced_sampling_is_refused_where_images_are_mixed_by_a_window() -> None:
    with pytest.raises(InputError, match=r"sampling=balanced needs all 1000 training images .* only 500 are mixed"):
        balanced(900, 100, shuffle_window=500)
    with pytest.raises(ValueError, match="balance the classes twice; choose one"):
        config(sampling="balanced", class_weights="balanced")


def test_unset_a_window_comes_with_the_size_of_the_shards() -> None:
    small = made_split(1000, image_bytes=MAX_PERMUTED_BYTES // 1000)
    assert shuffle_window(config(), small) is None
    large = made_split(*[1000] * 1000, image_bytes=MAX_PERMUTED_BYTES // 500_000)
    window = shuffle_window(config(), large)
    assert window is not None
    assert window * MAX_PERMUTED_BYTES // 500_000 == pytest.approx(DEFAULT_WINDOW_BYTES, rel=1e-4)
    assert shuffle_window(config(shuffle_window=70_000), large) == 70_000
    assert shuffle_window(config(shuffle_window=10**6), large) is None
    assert shuffle_window(config(shuffle_window=999), small) == 999


def test_a_lane_goes_through_its_own_share_of_the_shards_with_few_in_use_at_a_time() -> None:
    split = made_split(*[100] * 400)
    order = Order(config(shuffle_window=8_000), split).epoch(0, range(2))  # a node of half the lanes
    used = shards_of(split, order)  # [steps, lanes, images]
    assert len(used.unique()) <= 400 / 2 + 4
    steps = torch.arange(len(order)).view(-1, 1, 1).expand_as(used).flatten()
    first = torch.full((400,), 10**9).scatter_reduce(0, used.flatten(), steps, "amin")
    last = torch.full((400,), -1).scatter_reduce(0, used.flatten(), steps, "amax")
    in_use = torch.tensor([int(((first <= step) & (last >= step)).sum()) for step in range(len(order))])
    # A window of 2 000 images covers parts of 21 shards at most; there are two lanes.
    assert int(in_use.max()) <= 2 * 22
    assert float(in_use[len(order) // 4 : -len(order) // 4].double().mean()) == pytest.approx(2 * 21, rel=0.1)
    # They come into use one after another, not all at the same time.
    came = torch.bincount(first[last >= 0], minlength=len(order)).double()
    assert float(came.view(-1)[: len(order) // 10 * 10].view(10, -1).sum(1).max()) < 3 * 200 / 10


@pytest.mark.parametrize(
    ("shard", "window", "lanes"), [(50, 4_000, 1), (50, 4_000, 4), (200, 4_000, 4), (50, 1_000, 2), (400, 1_200, 4)]
)
def test_batches_of_one_class_shards_vary_as_much_as_is_said(shard: int, window: int, lanes: int) -> None:
    batch_size, shards = 64, 400_000 // shard
    split = made_split(*[shard] * shards)
    said = mixing(split, window, batch_size=batch_size, lanes=lanes)
    share = 0.3
    ratios = []
    for seed in range(6):
        random = torch.Generator().manual_seed(seed)
        of_class = torch.rand(shards, generator=random) < share
        chosen = Order(config(batch_size=batch_size, lanes=lanes, shuffle_window=window, seed=seed), split)
        order = chosen.epoch(0, range(lanes))
        steady = slice(window // lanes // (batch_size // lanes), -window // lanes // (batch_size // lanes))
        found = of_class[shards_of(split, order[steady])].double().mean((1, 2))
        p = float(of_class.double().mean())
        ratios.append(float(((found - p) ** 2).mean()) / (p * (1 - p) / batch_size))
    assert sum(ratios) / len(ratios) == pytest.approx(said, rel=0.06)
    if shard < window / lanes / 4:
        assert said == pytest.approx(1 + (batch_size - lanes) * shard / window, rel=0.1)


def test_all_images_at_a_time_are_a_perfect_mixture_and_larger_windows_a_better_one() -> None:
    split = made_split(*[100] * 400)
    assert mixing(split, None, batch_size=64, lanes=4) == 1
    found = [mixing(split, window, batch_size=64, lanes=4) for window in (1, 40, 400, 4_000, 39_999)]
    assert found == sorted(found, reverse=True)
    assert found[0] == pytest.approx(16, rel=0.01)  # a lane's batch is of one class, and there are four
    assert found[-1] < 1.2
