"""The task that finds weights to start from: published ones by name, and a user's files."""

import hashlib
import io
import os
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cnn.config.training import TrainConfig
from cnn.data.manifest import Manifest, SplitInfo
from cnn.errors import InputError
from cnn.networks.build import build_network
from cnn.networks.published import Published
from cnn.networks.weights import in_order_of, load_weights, read_pth, save_weights, weights_sha256
from infra.errors import ServiceError
from infra.fetch.meter import Meter
from infra.settings import Settings
from infra.sources.mirrors import Mirrors
from infra.sources.weights import OTHER_FILES, read_first_use
from infra.storage import bucket_layout
from infra.storage.cache import Cache
from infra.storage.object_store import ObjectStore
from tasks.config.run import RunConfig
from tasks.data.dataset import DatasetRef
from tasks.training import pretrained as module
from tests.cnn.conftest import source_report
from tests.infra.webserver import WebServer

pytestmark = pytest.mark.usefixtures("bucket")

MODEL = "shufflenet_v2_x1_0"
NAME = f"torchvision/{MODEL}.TEST"
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
CONFIG = RunConfig.model_validate({"model": MODEL, "pretrained": "imagenet", "batch_size": 8})


@pytest.fixture
def dataset(store: ObjectStore) -> DatasetRef:
    """A version of colour images of 64 pixels, of two classes."""
    statistics = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    splits = {"train": SplitInfo(count=8, class_counts=(4, 4), shards=())}
    report = source_report(images=2, side=64)
    manifest = Manifest(classes=("a", "b"), channels=3, image_size=64, splits=splits, report=report, **statistics)
    store.put_bytes(bucket_layout.dataset_manifest(manifest.version), manifest.to_bytes())
    return DatasetRef(version=manifest.version, name="pets")


def weights(seed: int = 0, model: str = MODEL) -> dict[str, Tensor]:
    """Weights for the thousand classes of ImageNet."""
    torch.manual_seed(seed)
    state: dict[str, Tensor] = build_network(
        TrainConfig(model=model), channels=3, image_size=64, classes=1000
    ).state_dict()
    return state


def publish(web: WebServer, monkeypatch: pytest.MonkeyPatch, tensors: Mapping[str, Tensor], folder: Path) -> str:
    """Has the library know of weights at a local server; returns their address."""
    file = folder / "published.pth"
    torch.save(dict(tensors), file)
    content = file.read_bytes()
    path = f"/net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    web.files[path] = content
    address = web.url + path
    known = Published(name=NAME, addresses=(address,), size=len(content), mean=MEAN, std=STD, licence="MIT")
    monkeypatch.setattr(module, "published_weights", lambda model: known)
    return address


def test_published_weights_are_stored_as_safetensors_and_set_the_normalisation(
    store: ObjectStore, dataset: DatasetRef, web: WebServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tensors = weights()
    address = publish(web, monkeypatch, tensors, tmp_path)
    config = module.pretrained.fn(CONFIG, dataset)
    assert (config.pretrained, config.pretrained_mean, config.pretrained_std) == ("imagenet", MEAN, STD)
    assert config.pretrained_sha256
    store.get_file(bucket_layout.pretrained_weights(config.pretrained_sha256), tmp_path / "stored.safetensors")
    network = build_network(CONFIG.training(), channels=3, image_size=64, classes=1000)
    assert weights_sha256(load_weights(network, tmp_path / "stored.safetensors").state_dict()) == weights_sha256(
        tensors
    )
    use = read_first_use(store, NAME)
    assert use and (use.file.address, use.sha256) == (address, config.pretrained_sha256)
    assert use.file.sha256 == hashlib.sha256((tmp_path / "published.pth").read_bytes()).hexdigest()


@pytest.mark.long
def test_a_second_use_needs_no_mirror_and_gives_an_equal_configuration(
    dataset: DatasetRef, web: WebServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    publish(web, monkeypatch, weights(), tmp_path)
    config = module.pretrained.fn(CONFIG, dataset)
    web.requests.clear()
    monkeypatch.setenv("CONVOY_HOME", str(tmp_path / "another machine"))
    assert module.pretrained.fn(CONFIG, dataset) == config and not web.requests


def test_weights_take_the_place_of_unused_files_in_a_limited_cache(
    store: ObjectStore, dataset: DatasetRef, web: WebServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    publish(web, monkeypatch, weights(), tmp_path)
    cache = Cache(Settings().cache, store)
    before = cache.path(cache.add_stream(io.BytesIO(bytes(1000))))
    os.utime(before, (1, 1))
    monkeypatch.setenv("CONVOY_CACHE_BYTES", "1")
    module.pretrained.fn(CONFIG, dataset)
    assert not before.exists()


@pytest.mark.long
def test_the_weights_of_the_first_use_are_enforced_from_then_on(
    store: ObjectStore, dataset: DatasetRef, web: WebServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Though the publisher states eight digits only, and another address would serve other weights."""
    address = publish(web, monkeypatch, weights(), tmp_path)
    config = module.pretrained.fn(CONFIG, dataset)
    first = (tmp_path / "published.pth").read_bytes()
    store.delete(bucket_layout.pretrained_weights(str(config.pretrained_sha256)))  # as prune does
    publish(web, monkeypatch, weights(seed=1), tmp_path)
    assert module.pretrained.fn(CONFIG, dataset) == config
    assert store.head(bucket_layout.pretrained_weights(str(config.pretrained_sha256)))
    store.delete(bucket_layout.pretrained_weights(str(config.pretrained_sha256)))
    web.files[address.removeprefix(web.url)] = b"other"
    with pytest.raises(ServiceError, match=rf"its SHA-256 is \w+, expected {hashlib.sha256(first).hexdigest()}\)"):
        module.pretrained.fn(CONFIG, dataset)


def test_a_normalisation_of_the_user_is_kept(
    dataset: DatasetRef, web: WebServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    publish(web, monkeypatch, weights(), tmp_path)
    own = {"pretrained_mean": (0.5, 0.5, 0.5), "pretrained_std": (0.5, 0.5, 0.5)}
    config = module.pretrained.fn(CONFIG.model_copy(update=own), dataset)
    assert config.pretrained_mean == (0.5, 0.5, 0.5) and config.pretrained_sha256


def test_published_weights_of_another_network_are_not_recorded(
    store: ObjectStore, dataset: DatasetRef, web: WebServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    address = publish(web, monkeypatch, weights(model="mobilenet_v3_small"), tmp_path)
    with pytest.raises(InputError, match=rf"^{re.escape(address)} is of another network: 0 of"):
        module.pretrained.fn(CONFIG, dataset)
    assert not [*store.list("published/"), *store.list("pretrained/")]


def test_without_a_mirror_all_that_were_tried_are_named(
    dataset: DatasetRef, web: WebServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    address = publish(web, monkeypatch, weights(), tmp_path)
    web.files.clear()
    monkeypatch.setenv("CONVOY_MIRROR", str(tmp_path / "mirror"))
    with pytest.raises(ServiceError) as refusal:
        module.pretrained.fn(CONFIG, dataset)
    file = address.rpartition("/")[2]
    assert str(refusal.value) == (
        f"pretrained=imagenet: no mirror has the weights of {NAME}: "
        f"file:{tmp_path}/mirror/{NAME}/{file} (no such file); file:{tmp_path}/mirror/{file} (no such file); "
        f"{address} (404 Not Found). "
        "Set CONVOY_MIRROR to a folder or an address that has it, or give a file of weights: pretrained=FILE"
    )


@pytest.mark.long
@pytest.mark.parametrize("in_bucket", [False, True], ids=["local", "s3"])
def test_a_users_file_of_pytorch_is_stored_as_the_safetensors_file_with_its_tensors(
    in_bucket: bool, store: ObjectStore, dataset: DatasetRef, tmp_path: Path
) -> None:
    torch.save(weights(), tmp_path / "ours.pth")
    save_weights(weights(), tmp_path / "ours.safetensors")
    digests = set()
    for name in ("ours.pth", "ours.safetensors"):
        address = str(tmp_path / name)
        if in_bucket:
            store.put_file(f"theirs/{name}", tmp_path / name)
            address = store.uri(f"theirs/{name}")
        config = module.pretrained.fn(CONFIG.model_copy(update={"pretrained": address}), dataset)
        assert config.pretrained_mean is None
        digests.add(config.pretrained_sha256)
    assert digests == {hashlib.sha256((tmp_path / "ours.safetensors").read_bytes()).hexdigest()}


def lite0(state: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """EfficientNet-Lite0 (Tan and Le, 2019; without squeeze-and-excitation) by the names of the wheel's own network."""

    def convolution(x: Tensor, layer: str, stride: int = 1, *, groups: int = 1) -> Tensor:
        weight, padding = state[f"{layer}.weight"], []
        for side in (x.shape[3], x.shape[2]):  # TensorFlow's "SAME"
            missing = max((-(-side // stride) - 1) * stride + weight.shape[-1] - side, 0)
            padding += [missing // 2, missing - missing // 2]
        return functional.conv2d(functional.pad(x, padding), weight, stride=stride, groups=groups)

    def norm(x: Tensor, layer: str) -> Tensor:
        mean, var, weight, bias = (state[f"{layer}.{of}"] for of in ("running_mean", "running_var", "weight", "bias"))
        return functional.batch_norm(x, mean, var, weight, bias, eps=1e-3)

    x = functional.relu6(norm(convolution(images, "_conv_stem", 2), "_bn0"))
    number = 0
    for repeats, first_stride in ((1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (4, 2), (1, 1)):
        for repeat in range(repeats):
            block, before, stride = f"_blocks.{number}", x, first_stride if repeat == 0 else 1
            if f"{block}._expand_conv.weight" in state:
                x = functional.relu6(norm(convolution(x, f"{block}._expand_conv"), f"{block}._bn0"))
            x = convolution(x, f"{block}._depthwise_conv", stride, groups=x.shape[1])
            x = functional.relu6(norm(x, f"{block}._bn1"))
            x = norm(convolution(x, f"{block}._project_conv"), f"{block}._bn2")
            x = x + before if before.shape == x.shape and stride == 1 else x
            number += 1
    x = functional.relu6(norm(convolution(x, "_conv_head"), "_bn1")).mean((2, 3))
    return functional.linear(x, state["_fc.weight"], state["_fc.bias"])


@pytest.mark.long
def test_the_wheels_weights_give_in_timms_network_what_they_give_in_their_own(tmp_path: Path) -> None:
    """The order of their names is all that connects them."""
    (file,) = OTHER_FILES["timm/tf_efficientnet_lite0.in1k"]
    try:
        with Mirrors(tmp_path) as mirrors, mirrors.fetched(file.address, Meter(0, lambda count: None)) as path:
            assert hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256
            state = read_pth(path, file.name)
    except ServiceError as error:
        pytest.skip(f"the index does not have the wheel: {error}")
    network = build_network(TrainConfig(model="efficientnet_lite0"), channels=3, image_size=96, classes=1000).eval()
    network.load_state_dict(in_order_of(network, state, file.name))
    images = torch.rand(3, 3, 96, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        expected = lite0(state, images)
        torch.testing.assert_close(network(images), expected, rtol=1e-3, atol=1e-3)
    assert float(expected.std()) > 0.5
