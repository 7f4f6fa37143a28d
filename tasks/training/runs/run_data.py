"""The data of a run: the version that a resumed run goes on with, and what follows from its size."""

from infra.errors import UsageError
from infra.storage.object_store import open_bucket
from tasks.config.run import RunConfig
from tasks.data.dataset import DatasetRef, is_complete, load_manifest
from tasks.data.prune_mark import wait_for_prune
from tasks.training.runs.run_record import RunRecord


def recorded_dataset(record: RunRecord) -> DatasetRef:
    """Returns the dataset version of a run to resume.

    Raises:
        UsageError: the bucket does not hold the whole version any more.
    """
    version = record.dataset.version
    store = open_bucket()
    wait_for_prune(store)
    if not is_complete(store, version):
        raise UsageError(f"the bucket lacks parts of dataset version {version}: the run cannot go on; train again")
    return record.dataset.model_copy(update={"reused": True})


def with_batch_size(config: RunConfig, dataset: DatasetRef) -> RunConfig:
    """Returns the configuration with a batch size for the size of the training split."""
    manifest = load_manifest(open_bucket(), dataset.version)
    return config.for_images(manifest.splits["train"].count)
