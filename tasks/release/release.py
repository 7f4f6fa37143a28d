"""The release task: makes a version that passed its gates the champion."""

from infra.tracking.model_registry import ModelVersion
from infra.tracking.promotion_history import AlreadyChampion
from tasks.orchestration.cancellation import stop_if_cancelled
from tasks.orchestration.flow_runs import flow_run_id
from tasks.orchestration.progress import run_logger
from tasks.orchestration.step import step
from tasks.release.promote import promote_version


@step("release")
def release(registered: ModelVersion, reason: str = "") -> None:
    """Makes the version the champion; does nothing if an earlier try of this flow did so.

    Args:
        reason: the reason that a person gave with the approval, if any.

    Raises:
        Cancelled: the flow run was cancelled.
        PromotionRefused: a gate has not passed it, or the champion has changed since the verdict.
        PromotionLost: another promotion came first.
        ServiceError: a server failed.
    """
    stop_if_cancelled()
    run = f" in Prefect flow run {flow}" if (flow := flow_run_id()) else ""
    reason = f"passed its gates{run}" + (f"; approved: {reason}" if reason else "")
    try:
        run_logger().info("%s was %s", registered.name, promote_version(registered, reason=reason))
    except AlreadyChampion as already:
        run_logger().info("%s", already)
