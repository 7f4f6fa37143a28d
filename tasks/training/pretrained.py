"""Stores weights to start from, under their digest, and checks them against the network before a run exists."""

from pathlib import Path
from tempfile import TemporaryDirectory

from cnn.networks.build import build
from cnn.networks.weights import load_pretrained
from infra.errors import UsageError
from infra.settings import Settings
from infra.storage import bucket_layout
from infra.storage.cache import Cache
from infra.storage.object_store import ObjectStore, open_bucket, parse_s3
from infra.storage.s3_client import ObjectMissing
from tasks.config.run import RunConfig
from tasks.data.dataset import DatasetRef, load_manifest
from tasks.orchestration.cancellation import stop_if_cancelled
from tasks.orchestration.progress import run_logger
from tasks.orchestration.step import step


@step("pretrained", retried=False)
def pretrained(config: RunConfig, dataset: DatasetRef) -> RunConfig:
    """Stores the weights that `config.pretrained` names, and returns the configuration with their digest.

    Raises:
        UsageError: the file does not exist.
        InputError: the weights do not fit the network.
        ServiceError: the storage failed.
    """
    stop_if_cancelled()
    assert config.pretrained
    store = open_bucket()
    with TemporaryDirectory() as temporary:
        file = Path(config.pretrained)
        if config.pretrained.startswith("s3://"):
            bucket, key = parse_s3(config.pretrained)
            file = Path(temporary) / "weights.safetensors"
            try:
                ObjectStore.connect(bucket, create=False).get_file(key, file)
            except ObjectMissing:
                raise UsageError(f"pretrained: {config.pretrained} does not exist") from None
        if not file.is_file():
            raise UsageError(f"pretrained: the file {config.pretrained} does not exist")
        network = build(config.training(), load_manifest(store, dataset.version))
        fresh = load_pretrained(network, file)
        cache = Cache(Settings().cache, store)
        sha256 = cache.add_file(file)
        store.put_file(bucket_layout.pretrained_weights(sha256), cache.path(sha256), sha256=sha256)
    run_logger().info("starting from %s%s", config.pretrained, f", except {', '.join(fresh)}" if fresh else "")
    return config.model_copy(update={"pretrained_sha256": sha256})
