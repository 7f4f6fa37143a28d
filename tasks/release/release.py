"""The release task: makes a version that passed its gates the champion."""

from infra.tracking.model_registry import ModelVersion
from infra.tracking.promotion_history import AlreadyChampion, PromotionLost
from infra.tracking.tags import VersionRecord
from tasks.orchestration.cancellation import stop_if_cancelled
from tasks.orchestration.flow_runs import flow_run_id
from tasks.orchestration.progress import run_logger
from tasks.orchestration.step import step
from tasks.release.promote import ChampionChanged, promote_version


@step("release")
def release(registered: ModelVersion, approval: VersionRecord | None = None) -> bool:
    """Makes the version the champion; does nothing if an earlier try of this flow did so.

    Args:
        approval: a person's decision, if one was asked for.

    Returns:
        Whether it is champion. False: the champion has changed since the verdict, so the version must be judged again.

    Raises:
        Cancelled: the flow run was cancelled.
        PromotionRefused: a gate has not passed it.
        ServiceError: a server failed.
    """
    stop_if_cancelled()
    run = f" in Prefect flow run {flow}" if (flow := flow_run_id()) else ""
    reason = f"passed its gates{run}" + (f"; {approval.approval_sentence}" if approval else "")
    by = approval.approval_by if approval else None
    while True:
        try:
            promotion = promote_version(registered, reason=reason, approved_by=by or "")
            run_logger().info("%s was %s", registered.name, promotion)
        except AlreadyChampion as already:
            run_logger().info("%s", already)
        except ChampionChanged as changed:
            run_logger().warning("%s", changed)
            return False
        except PromotionLost as lost:  # perhaps to a promotion of this version by hand
            run_logger().warning("%s (this flow run now decides again)", lost)
            continue
        return True
