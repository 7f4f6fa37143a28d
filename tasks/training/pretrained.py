"""Stores weights to start from, under their digest, and checks them against the network before a run exists."""

import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor, nn

from cnn.config.training import IMAGENET
from cnn.networks.build import build
from cnn.networks.published import Published, published_weights, with_present_names
from cnn.networks.weights import in_order_of, load_pretrained, read_pth, save_weights
from cnn.training.trainer import check_fits
from infra.errors import ServiceError, UsageError
from infra.settings import Settings
from infra.sources.base import Workplace
from infra.sources.mirrors import Mirrors
from infra.sources.weights import (
    OTHER_FILES,
    FirstUse,
    WeightsFile,
    fetch_weights,
    read_first_use,
    record_first_use,
)
from infra.storage import bucket_layout
from infra.storage.cache import Cache
from infra.storage.object_store import ObjectStore, open_bucket, parse_s3
from infra.storage.s3_client import ObjectMissing
from tasks.config.run import RunConfig
from tasks.data.dataset import DatasetRef, load_manifest, open_cache
from tasks.orchestration.cancellation import stop_if_cancelled
from tasks.orchestration.progress import progress, run_logger
from tasks.orchestration.step import step


@step("pretrained")
def pretrained(config: RunConfig, dataset: DatasetRef) -> RunConfig:
    """Stores the weights that `config.pretrained` names, and returns the configuration with their digest.

    Published weights also set the mean and standard deviation by which images are normalised, unless these are set.

    Raises:
        UsageError: the file does not exist.
        InputError: the weights do not fit the network, this does not fit the images, or nobody has published weights of
            it.
        ServiceError: the storage failed, or no mirror has the weights.
    """
    stop_if_cancelled()
    asked = config.pretrained
    assert asked
    store = open_bucket()
    cache = open_cache(store)
    manifest = load_manifest(store, dataset.version)
    check_fits(config.training(), manifest)  # before weights are downloaded
    network = build(config.training(), manifest)
    if asked == IMAGENET:
        weights = published_weights(config.model)
        sha256, named = _published(weights, network, cache)
        if config.pretrained_mean is None:
            config = config.model_copy(update={"pretrained_mean": weights.mean, "pretrained_std": weights.std})
    else:
        sha256, named = _of_user(asked, cache), asked
    fresh = load_pretrained(network, cache.path(sha256), named=named)
    key = bucket_layout.pretrained_weights(sha256)
    if store.head(key) is None:
        store.put_file(key, cache.path(sha256), sha256=sha256)
    cache.trim()
    run_logger().info("starting from %s%s", named, f", except {', '.join(fresh)}" if fresh else "")
    return config.model_copy(update={"pretrained_sha256": sha256})


def _of_user(address: str, cache: Cache) -> str:
    """Puts the weights of a user's file into the cache as a safetensors file; returns its SHA-256."""
    with TemporaryDirectory() as temporary:
        file = Path(address)
        if address.startswith("s3://"):
            bucket, key = parse_s3(address)
            file = Path(temporary) / Path(key).name
            try:
                ObjectStore.connect(bucket, create=False).get_file(key, file)
            except ObjectMissing:
                raise UsageError(f"pretrained: {address} does not exist") from None
        else:
            check_exists(address)
        return (
            _converted(with_present_names(read_pth(file, address)), cache) if _is_pth(address) else cache.add_file(file)
        )


def check_exists(address: str) -> None:
    """Raises UsageError if `pretrained` names a local file that does not exist."""
    if not address.startswith("s3://") and not os.path.isfile(address):
        raise UsageError(f"pretrained: the file {address} does not exist")


def _published(weights: Published, network: nn.Module, cache: Cache) -> tuple[str, str]:
    """Puts published weights into the cache as a safetensors file: from the bucket, once they have been used.

    Returns:
        SHA-256 of that file, and the weights' name and origin for messages.
    """
    store = cache.store
    use = read_first_use(store, weights.name)
    if use and store.head(key := bucket_layout.pretrained_weights(use.sha256)):
        cache.fetch(key, use.sha256)
        return use.sha256, weights.name
    official = (WeightsFile.at(address, weights.size) for address in weights.addresses)
    files = (use.file,) if use else (*official, *OTHER_FILES.get(weights.name, ()))
    settings = Settings()
    with (
        Mirrors(settings.cache / "partial") as mirrors,
        progress(f"Downloading the weights of {weights.name}", weights.size, unit="bytes") as advance,
    ):
        place = Workplace(mirrors=mirrors, store=store, cache=cache)
        try:
            file, origin = fetch_weights(weights.name, files, place, advance, own_mirror=settings.mirror)
        except ServiceError as error:
            raise ServiceError(f"pretrained={IMAGENET}: {error}, or give a file of weights: pretrained=FILE") from error
    assert file.sha256
    sha256 = file.sha256
    if _is_pth(file.name):
        tensors = with_present_names(read_pth(cache.path(sha256), origin))
        sha256 = _converted(in_order_of(network, tensors, origin) if file.in_order else tensors, cache)
    load_pretrained(network, cache.path(sha256), named=origin)  # before they are recorded
    if use is None:
        record_first_use(store, weights.name, FirstUse(file=file, sha256=sha256))
    return sha256, f"{weights.name} (licence {weights.licence}; from {origin})"


def _converted(tensors: Mapping[str, Tensor], cache: Cache) -> str:
    """Puts tensors into the cache as a safetensors file; returns the file's SHA-256."""
    with TemporaryDirectory() as temporary:
        file = Path(temporary, "weights.safetensors")
        save_weights(tensors, file)
        return cache.add_file(file)


def _is_pth(name: str) -> bool:
    return name.endswith((".pth", ".pt", ".bin"))
