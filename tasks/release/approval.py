"""A person's yes before a version becomes champion (`approval: true`): the flow run pauses in Prefect and asks."""

import asyncio

from prefect import apause_flow_run
from prefect.exceptions import FlowPauseTimeout
from prefect.input import RunInput

from infra.errors import GateRefused
from infra.tracking.model_registry import ModelVersion
from tasks.orchestration.cancellation import POLL_SECONDS, Cancelled, is_cancelled, stop_if_told
from tasks.orchestration.progress import run_logger
from tasks.release.verdict import Verdict


class Approval(RunInput):
    """The form in Prefect."""

    promote: bool = False
    reason: str = ""
    """Kept in the model's history."""


class ApprovalRefused(GateRefused):
    """A person said no, or nobody said anything in time."""


def ask(registered: ModelVersion, verdict: Verdict, patience: float) -> str:
    """Pause the flow run until someone approves the promotion in Prefect; returns the reason given.

    Args:
        patience: seconds to wait for the answer.

    Raises:
        ApprovalRefused: the answer was no, or there was none.
        Cancelled: the flow run was cancelled meanwhile.
    """
    run_logger().info(
        "waiting for a person: to promote %s, press Resume at this flow run in Prefect and switch `promote` on",
        registered.uri,
    )
    page = f"Promote **{registered.address}** to champion?\n\n{verdict.markdown()}"
    answer = asyncio.run(_paused(page, patience))
    if answer is None:
        raise ApprovalRefused(f"nobody approved {registered.address} within {patience:,.0f} s; it is not promoted")
    if not answer.promote:
        raise ApprovalRefused(
            f"{registered.address} was not approved" + (f": {answer.reason}" if answer.reason else "")
        )
    return answer.reason


async def _paused(page: str, patience: float) -> Approval | None:
    """Returns the answer; None if there was none. A pause does not notice that its flow run is cancelled, so we look.

    Nothing goes on asking after the end: a thread that did could abort the interpreter while that ends.
    """
    form = Approval.with_initial_data(description=page)
    pause = asyncio.ensure_future(
        apause_flow_run(wait_for_input=form, timeout=int(patience), poll_interval=int(POLL_SECONDS))
    )
    while not (await asyncio.wait({pause}, timeout=POLL_SECONDS))[0]:
        stop_if_told()
        if is_cancelled():
            raise Cancelled("the flow run was cancelled while it waited for approval")
    try:
        return pause.result()
    except FlowPauseTimeout:
        return None
