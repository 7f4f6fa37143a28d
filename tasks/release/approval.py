"""Asks a person to approve a promotion (`approval: true`): pauses the flow run in Prefect until the answer."""

import asyncio

from prefect import apause_flow_run
from prefect.exceptions import FlowPauseTimeout
from prefect.input import RunInput

from infra.errors import GateRefused
from infra.tracking.model_registry import ModelVersion
from tasks.orchestration.cancellation import POLL_SECONDS, Cancelled, is_cancelled, stop_if_told
from tasks.orchestration.progress import run_logger
from tasks.release.quality.verdict import Verdict


class Approval(RunInput):
    """The form that Prefect shows."""

    promote: bool = False
    reason: str = ""
    """Kept in the model's history."""


class ApprovalRefused(GateRefused):
    """The promotion was rejected, or not approved in time."""


def wait_for_approval(registered: ModelVersion, verdict: Verdict, time_limit: float) -> str:
    """Pauses the flow run until a person approves the promotion in Prefect; returns the reason given.

    Args:
        time_limit: seconds to wait for the answer.

    Raises:
        ApprovalRefused: the answer was no, or none came in time.
        Cancelled: the flow run was cancelled meanwhile.
    """
    run_logger().info(
        "waiting for approval: to promote %s, press Resume at this flow run in Prefect and switch `promote` on",
        registered.uri,
    )
    page = f"Promote **{registered.address}** to champion?\n\n{verdict.markdown()}"
    answer = asyncio.run(_answer(page, time_limit))
    if answer is None:
        raise ApprovalRefused(f"{registered.address} was not approved within {time_limit:,.0f} s")
    if not answer.promote:
        reason = f": {answer.reason}" if answer.reason else ""
        raise ApprovalRefused(f"{registered.address} was not approved{reason}")
    return answer.reason


async def _answer(page: str, time_limit: float) -> Approval | None:
    """Returns the answer, or None if there was none. Polls for a cancellation, which a paused flow run does not notice.

    No thread keeps polling afterwards: it could abort the interpreter at its exit.
    """
    form = Approval.with_initial_data(description=page)
    pause = asyncio.ensure_future(
        apause_flow_run(wait_for_input=form, timeout=int(time_limit), poll_interval=int(POLL_SECONDS))
    )
    while not (await asyncio.wait({pause}, timeout=POLL_SECONDS))[0]:
        stop_if_told()
        if is_cancelled():
            raise Cancelled("the flow run was cancelled while it waited for approval")
    try:
        return pause.result()
    except FlowPauseTimeout:
        return None
