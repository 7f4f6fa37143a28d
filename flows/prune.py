"""The prune flow: removes old objects and files that are not in use, on a schedule or by hand."""

from prefect import flow

from flows.run_names import pruning_name
from tasks.config.retention import RetentionConfig
from tasks.upkeep.prune import Pruned, prune

DEFAULTS = RetentionConfig()


@flow(name="prune", flow_run_name=pruning_name, persist_result=False)
def prune_flow(retention: RetentionConfig = DEFAULTS, dry_run: bool = False, forget_unknown: bool = False) -> Pruned:
    """Removes old checkpoints, data, reports and cached files that are not in use.

    Args:
        retention: How long each kind is kept, in days.
        dry_run: Only report what would be removed.
        forget_unknown: Continue if MLflow does not know runs or promoted versions of which the bucket holds data.
    """
    return prune(retention, dry_run=dry_run, forget_unknown=forget_unknown)
