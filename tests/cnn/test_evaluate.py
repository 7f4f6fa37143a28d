"""Evaluation counts every image once and agrees with a plain loop."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from cnn.config.training import TrainConfig
from cnn.data.mapped_split import MappedSplit
from cnn.distributed.lanes import Exchange
from cnn.distributed.process_group import without_tf32
from cnn.evaluation.evaluate import EVAL_BATCH, eval_batch, evaluate, predict_logits
from cnn.networks.build import build_network
from cnn.networks.wrappers import Normalise
from tests.cnn.conftest import Packed

CPU = torch.device("cpu")


@pytest.fixture
def network(digits: Packed) -> nn.Module:
    torch.manual_seed(0)
    config = TrainConfig.model_validate({"network": {"width": 4, "dropout": 0.5}})
    trained_part = build_network(config, channels=1, image_size=8, classes=10)
    return nn.Sequential(Normalise(digits.manifest.mean, digits.manifest.std), trained_part)


def one_by_one(network: nn.Module, split: MappedSplit) -> Tensor:
    network.eval()
    with torch.no_grad():
        return torch.cat([network(split.slice(i, i + 1)[0]) for i in range(len(split))])


class Recorder(nn.Module):
    """Gives each image, by its first pixel, a logit, and remembers what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        numbers = images[:, 0, 0, :2].int()
        numbers = numbers[:, 0] * 256 + numbers[:, 1]
        self.seen += numbers.tolist()
        return torch.stack([numbers % 2 == 0, numbers % 2 == 1], 1).float()


def numbered(count: int, folder: Path) -> MappedSplit:
    """Images that carry their number; the label is right for all but every tenth."""
    numbers = torch.arange(count)
    images = torch.zeros(count, 1, 2, 2, dtype=torch.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = (numbers // 256).byte(), (numbers % 256).byte()
    labels = torch.where(numbers % 10 == 0, 1 - numbers % 2, numbers % 2)
    paths = [folder / f"{part}.safetensors" for part in range(2)]
    for path, chosen in zip(paths, (slice(0, count // 3), slice(count // 3, count)), strict=True):
        save_file({"images": images[chosen].contiguous(), "labels": labels[chosen].contiguous()}, path)
    return MappedSplit(paths)


@pytest.mark.parametrize("split", ["val", "test"])
def test_logits_are_those_of_each_image_alone_in_the_order_of_the_split(
    network: nn.Module, digits: Packed, split: str
) -> None:
    packed = digits.split(split)
    logits = predict_logits(network, packed, CPU)
    assert (logits.shape, logits.dtype) == ((len(packed), 10), torch.float32)
    torch.testing.assert_close(logits, one_by_one(network, packed))


def test_score_agrees_with_a_plain_loop(network: nn.Module, digits: Packed) -> None:
    split = digits.split("train")
    assert len(split) % EVAL_BATCH  # the last batch is a short one
    score = evaluate(network, split, CPU, Exchange(None))
    logits = one_by_one(network, split)
    assert score.accuracy == int((logits.argmax(1) == split.labels).sum()) / len(split)
    assert score.loss == pytest.approx(float(F.cross_entropy(logits.double(), split.labels)))


@pytest.mark.parametrize("count", [1, EVAL_BATCH - 1, EVAL_BATCH, EVAL_BATCH + 1, 3 * EVAL_BATCH + 7])
def test_every_image_counts_once(count: int, tmp_path: Path) -> None:
    split, network = numbered(count, tmp_path) if count > 1 else single(tmp_path), Recorder()
    score = evaluate(network, split, CPU, Exchange(None))
    assert network.seen == list(range(count))
    assert score.accuracy == pytest.approx(1 - len(range(0, count, 10)) / count)
    done: list[int] = []
    network.seen.clear()
    logits = predict_logits(network, split, CPU, on_progress=done.append)
    assert sorted(network.seen) == list(range(count))  # several batches at a time
    assert torch.equal(logits[:, 1], torch.arange(count).float() % 2)
    assert sum(done) == len(logits) == count


@pytest.mark.parametrize(("side", "images"), [(28, 250), (91, 250), (160, 81), (224, 41), (2000, 1)])
def test_large_images_make_small_batches(side: int, images: int, tmp_path: Path) -> None:
    save_file({"images": torch.zeros(1, 3, side, side, dtype=torch.uint8), "labels": torch.tensor([1])}, tmp_path / "s")
    assert eval_batch(MappedSplit([tmp_path / "s"])) == images


def single(folder: Path) -> MappedSplit:
    path = folder / "one.safetensors"
    save_file({"images": torch.zeros(1, 1, 2, 2, dtype=torch.uint8), "labels": torch.tensor([1])}, path)
    return MappedSplit([path])


def test_logits_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = build_network(TrainConfig.model_validate({"model": "notes"}), channels=1, image_size=28, classes=10)
    images = torch.randint(0, 256, (2 * EVAL_BATCH, 1, 28, 28), dtype=torch.uint8)
    save_file({"images": images, "labels": torch.zeros(len(images), dtype=torch.int64)}, tmp_path / "shard.safetensors")
    split, before = MappedSplit([tmp_path / "shard.safetensors"]), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(predict_logits(nn.Sequential(Normalise((0.5,), (0.5,)), network), split, CPU))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize(("convolutions", "products"), [(True, True), (True, False), (False, False)])
def test_evaluation_is_in_float32_whatever_training_is_in(digits: Packed, convolutions: bool, products: bool) -> None:
    seen = list[bool]()

    class Watching(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
            return torch.zeros(len(images), 10)

    with without_tf32():  # which also restores what this test sets
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products
        predict_logits(Watching(), digits.split("val"), torch.device("cpu"))
        assert set(seen) == {False}
        assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == (convolutions, products)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_network_as_it_was(network: nn.Module, digits: Packed, training: bool) -> None:
    network.train(training)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    evaluate(network, digits.split("val"), CPU, Exchange(None))
    predict_logits(network, digits.split("val"), CPU)
    assert all(module.training is training for module in network.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
