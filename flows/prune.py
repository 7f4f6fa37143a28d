"""The flow that removes what is old enough to go: for a schedule, or by hand."""

from prefect import flow

from tasks.config.retention import RetentionConfig
from tasks.upkeep.prune import Pruned, prune

DEFAULTS = RetentionConfig()


@flow(name="prune", persist_result=False)
def prune_flow(retention: RetentionConfig = DEFAULTS, dry_run: bool = False, forget_unknown: bool = False) -> Pruned:
    """Remove what nothing rests on and has had its time.

    Args:
        retention: how long what is kept.
        dry_run: only say what would go.
        forget_unknown: go on if MLflow does not know runs or promoted versions of which the bucket holds data.
    """
    return prune(retention, dry_run=dry_run, forget_unknown=forget_unknown)
