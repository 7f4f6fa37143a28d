"""Asks a person to approve a promotion (`approval: true`): pauses the flow run in Prefect until the decision."""

import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import httpx
from prefect import get_client
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State, StateType
from prefect.client.schemas.responses import SetStateStatus
from prefect.exceptions import PrefectException
from prefect.input import RunInput
from prefect.input.actions import read_flow_run_input
from prefect.input.run_input import Keyset, keyset_from_paused_state
from prefect.states import Paused, Running
from pydantic import Field

from infra.errors import GateRefused, ServiceError
from infra.machine import stopping
from infra.storage.object_store import open_bucket
from infra.tracking import mlflow_runs
from infra.tracking.model_registry import ModelVersion, RegisteredVersion, describe_version, tag_version
from infra.tracking.model_versions import find_version
from infra.tracking.tags import APPROVED, EXPIRED, REFUSED, VersionRecord, decision
from tasks.orchestration.cancellation import POLL_SECONDS, STOPPED, Cancelled, Superseded, stop_if_cancelled
from tasks.orchestration.flow_runs import flow_run_id, page_of
from tasks.orchestration.messages import tell_waiting
from tasks.orchestration.progress import run_logger
from tasks.orchestration.step import step
from tasks.release.model_card import with_approval
from tasks.release.promote import verdict_on
from tasks.release.quality.verdict import Verdict
from tasks.reporting.markdown import accuracy_and_gain, plain

MARGIN_SECONDS = 60  # for which Prefect keeps the flow run paused after the time limit: it would make it fail


class Approval(RunInput):
    """The form that Prefect shows. All fields are required.

    The decision is typed: the list of choices that Prefect shows for an `enum` closes at once in this dialog when it is
    opened with the mouse (Prefect 3.9.1).
    """

    decision: str = Field(
        title="Promote or refuse?",
        pattern=r"^\s*([Pp]romote|[Rr]efuse)\s*$",
        description="Type one of the two words. Promote makes it the champion; refuse keeps the present one.",
    )
    name: str = Field(title="Your name", pattern=r"\S", max_length=100, description="It is kept with the version.")
    reason: str = Field(pattern=r"\S", max_length=1000, description="Why; it is kept with the version.")


class ApprovalRefused(GateRefused):
    """A person refused the promotion, or nobody decided in time."""


def wait_for_approval(registered: ModelVersion, verdict: Verdict, time_limit: float) -> VersionRecord:
    """Pauses the flow run until a person decides about the promotion in Prefect; returns the decision.

    Args:
        time_limit: seconds to wait for the decision.

    Raises:
        Cancelled: the flow run was cancelled, or ended by someone else.
        Stopped: a signal asked this process to end.
    """
    flow_run = flow_run_id()
    assert flow_run is not None
    link = page_of(flow_run)
    deadline = time.monotonic() + time_limit
    until = datetime.now(UTC) + timedelta(seconds=time_limit)
    run_id = find_version(registered.address).run_id
    report = mlflow_runs.report_url(run_id)
    question = [f"Shall **{plain(registered.address)}** become the champion?", "", *verdict.sentences()]
    form = Approval.with_initial_data(
        description="\n".join([*question, "", f"[The report, with all tables and pictures]({report})"])
    )
    message = (
        f"{registered.address} waits for a person until {until:%Y-%m-%d %H:%M} UTC: "
        f"press Resume at {link} to promote or refuse it"
    )
    keyset = _pause(flow_run, form, message, time_limit)
    run_logger().info("%s", message)
    tell_waiting(registered.name, registered.version, link, result=accuracy_and_gain(verdict.accuracy, verdict.gain))
    try:
        answer = _answer(flow_run, form, keyset, deadline)
    except STOPPED:
        run_logger().warning("%s still waits for a person; `convoy resume %s` asks again", registered.address, run_id)
        raise
    if answer is None:
        return decision(EXPIRED)
    outcome = APPROVED if answer.decision.strip().lower() == "promote" else REFUSED
    return decision(outcome, answer.name.strip(), answer.reason.strip())


@step("record-decision")
def record_decision(registered: ModelVersion, made: VersionRecord) -> None:
    """Puts a person's decision, or that it is awaited, into the version's tags, its card and the verdict's page.

    Raises:
        ServiceError: a server failed.
    """
    tag_version(registered, made.to_tags())
    found = find_version(registered.address)
    if verdict := show_decision(found):
        said = found.record.approval_sentence
        page = verdict.markdown(said)
        create_markdown_artifact(page, key="quality-gate", description=f"{verdict.summary}; approval: {said}")


def show_decision(version: RegisteredVersion) -> Verdict | None:
    """Puts the decision that a version's tags name into its card and the verdict's page; returns the verdict."""
    said = version.record.approval_sentence
    describe_version(version, with_approval(version.description, said))
    if verdict := verdict_on(open_bucket(), version):
        mlflow_runs.log_text(version.run_id, "report/verdict.md", verdict.markdown(said))
    return verdict


def _pause(flow_run: UUID, form: type[Approval], message: str, time_limit: float) -> Keyset:
    """Pauses the flow run, with a form; returns the keys of the form and its answer.

    `prefect.pause_flow_run` would give the state no message, and would let it fail at the time limit.
    """
    paused: State[None] = Paused(
        message=message, timeout_seconds=int(time_limit) + MARGIN_SECONDS, pause_key=uuid4().hex
    )
    keyset = keyset_from_paused_state(paused)
    paused.state_details.run_input_keyset = {str(key): name for key, name in keyset.items()}
    with get_client(sync_client=True) as client:
        done = client.set_flow_run_state(flow_run, paused)
    if done.status != SetStateStatus.ACCEPT:
        stop_if_cancelled()
        raise ServiceError(
            f"Prefect does not pause flow run {flow_run}: {getattr(done.details, 'reason', done.status)}"
        )
    form.save(keyset)  # only now: pausing deletes what these keys held
    return keyset


def _answer(flow_run: UUID, form: type[Approval], keyset: Keyset, deadline: float) -> Approval | None:
    """Polls for the answer until the deadline; returns None if there is none. Outages of Prefect are waited out."""
    while (left := deadline - time.monotonic()) > 0:
        stopping.sleep(min(POLL_SECONDS, left))
        with suppress(httpx.HTTPError, PrefectException), get_client(sync_client=True) as client:
            state = client.read_flow_run(flow_run).state
            if state and state.is_running():
                return _given(flow_run, form, keyset)
            if state and state.type == StateType.CRASHED:
                raise Superseded(state.message)
            if state and (state.is_final() or state.type == StateType.CANCELLING):
                raise Cancelled(f"the flow run became {state.name} while it waited for approval")
    with suppress(httpx.HTTPError, PrefectException), get_client(sync_client=True) as client:
        client.set_flow_run_state(flow_run, Running())  # from here on, Prefect accepts no answer
    return _given(flow_run, form, keyset)


def _given(flow_run: UUID, form: type[Approval], keyset: Keyset) -> Approval | None:
    answer = read_flow_run_input(keyset["response"], flow_run_id=flow_run)
    return form.model_validate(answer) if answer else None
