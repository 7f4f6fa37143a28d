"""Reports to Prefect what people should hear about a training, as events; `notifications` sends them to a chat.

Each event has one of the names below and its text in the payload, so that a team's own automations can use it too.
"""

from typing import Literal

import httpx
from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.context import FlowRunContext
from prefect.events import Event
from prefect.exceptions import PrefectException

from infra.errors import one_line
from infra.tracking.tags import STARTED_BY
from tasks.orchestration.flow_runs import page_of
from tasks.orchestration.progress import run_logger

Kind = Literal["promoted", "registered", "refused", "failed", "waiting", "test"]

MISTAKE, INTERRUPTED = 2, (75, 130)  # exit statuses
UNATTENDED = ("schedule", "event")  # reasons why a resumed flow run began
REASON_CHARACTERS = 1000  # of an error's message, which may be a whole page


def event_name(kind: Kind, *, minor: bool = False) -> str:
    """Returns the name of the event; a minor one is about what only the person who started the run wants to know."""
    return f"convoy.{kind}{'.minor' * minor}"


def emit(client: SyncPrefectClient, kind: Kind, text: str, *, minor: bool = False) -> Event:
    """Emits an event and waits until Prefect has it; Prefect's own function sends in the background, without an answer.

    Raises:
        httpx.HTTPError: Prefect refuses the event or cannot be reached.
    """
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    resource = {"prefect.resource.id": f"prefect.flow-run.{run.id}", "prefect.resource.name": run.name} if run else {}
    event = Event(
        event=event_name(kind, minor=minor),
        resource=resource or {"prefect.resource.id": "convoy.notifications"},
        payload={"text": text},
    )
    client.request("POST", "/events", json=[event.model_dump(mode="json")])
    return event


def tell(kind: Kind, text: str, *, minor: bool = False) -> None:
    """Reports something about the current flow run; if Prefect does not take it, the flow goes on.

    Args:
        minor: sent to a chat only if `convoy notify --all` asked for such messages.
    """
    try:
        with get_client(sync_client=True) as client:
            emit(client, kind, text, minor=minor)
    except (httpx.HTTPError, PrefectException) as error:
        run_logger().warning("no message is sent that the run is %s: %s", kind, error)


def tell_waiting(model: str, version: str, link: str, *, result: str = "") -> None:
    """Reports that a version waits for a person's approval.

    Args:
        link: address of the page where the person answers.
        result: how good the version is, for example its accuracy.
    """
    head = f"{model}/{version} waits for approval{f': {result}' if result else ''}"
    tell("waiting", f"{head}\npromote or refuse: {link}")


def tell_failure(error: Exception, *, trial: bool, resumable: bool = False) -> None:
    """Reports that the current flow run has failed.

    Minor are failed trial runs, interruptions, what goes on by itself, and mistakes (exit status 2). A mistake in a run
    that a schedule or an event has started is not minor: nobody watches that run.

    Args:
        trial: the run is a trial.
        resumable: a worker resumes the run, if a deployment has started it.
    """
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    status = getattr(error, "exit_status", None)
    unattended = run is not None and (
        run.auto_scheduled or run.created_by is not None or run.labels.get(STARTED_BY) in UNATTENDED
    )
    goes_on = resumable and run is not None and run.deployment_id is not None
    minor = trial or goes_on or status in INTERRUPTED or (status == MISTAKE and not unattended)
    reason = one_line(error) if status else f"{type(error).__name__}: {one_line(error)}"
    if len(reason) > REASON_CHARACTERS:
        reason = f"{reason[:REASON_CHARACTERS]} …"
    flow = f"{context.flow.name} {run.name}" if context and context.flow and run else "a run"
    link = f"\nflow run: {page_of(run.id)}" if run else ""
    tell("failed", f"{flow} failed: {reason}{link}", minor=minor)
