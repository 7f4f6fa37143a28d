"""Prefect automations that send messages to a chat: about trainings, or when a flow has not succeeded for long.

What a flow itself reports arrives as an event of `messages`, with its text. Prefect's own events report what a flow
cannot: that its process was killed, that it never began, and that no run has succeeded.

The webhook's address is a secret: it gives write access to the chat. Prefect stores it encrypted in a block. Prefect
has two kinds of webhook block. The one for notifications would write the address into the server's log when the
receiver answers with an error, and would repeat a message that may have arrived. The plain one, used here, does
neither: a message is sent once, and the answer is among the automation's events in Prefect. (Of two simultaneous
messages, Prefect may record one as failed with a ReadError although it arrived: they share a connection pool, which
the first to end closes.)
"""

import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

from prefect import get_client
from prefect.automations import AutomationCore, EventTrigger, Posture
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient
from prefect.events.actions import CallWebhook
from prefect.events.filters import EventFilter, EventNameFilter, EventOccurredFilter, EventRelatedFilter
from prefect.exceptions import ObjectNotFound
from pydantic import SecretStr

from infra.errors import ServiceError, UsageError, one_line
from infra.machine import stopping
from tasks.orchestration.flow_runs import TRAINING_FLOWS, page_of
from tasks.orchestration.messages import Kind, emit, event_name

BLOCK = "convoy-notifications"
PREFIX = "convoy: "
PROMOTED, REFUSED, WAITING, FAILED, CRASHED, NOT_BEGUN, STALE, TEST = (
    f"{PREFIX}{word}"
    for word in ("promoted", "refused", "waiting for approval", "failed", "crashed", "not begun", "stale", "test")
)
EARLIER = (f"{PREFIX}completed",)  # of older versions of Convoy

EVENTS: dict[str, Kind] = {
    PROMOTED: "promoted",
    REFUSED: "refused",
    WAITING: "waiting",
    FAILED: "failed",
    TEST: "test",
}
"""The event of `messages` that each automation sends."""

STATES = {
    CRASHED: (("Crashed",), "Execution was *"),
    NOT_BEGUN: (("Failed", "TimedOut"), "Flow run encountered an exception*"),
}
"""Names of the states that each automation reports (an event is named after the state's name, not its type), and the
state's message if the flow could report by itself: an exception, or a signal that interrupted it."""

SUCCESS_STATES = ("Completed", "Skipped")  # Skipped: a retraining without a reason to train has succeeded too
MESSAGE_CHARACTERS = 1000  # of a state's message: an exception's message may be a whole page
ACTION_ENDS = ("prefect.automation.action.executed", "prefect.automation.action.failed")
ANSWER_CHARACTERS = 200
ANSWER_SECONDS = 60.0  # that the receiver's answer may take; Prefect stores events every 5 s
POLL_SECONDS = 0.5
CLOCKS_DIFFER = timedelta(days=1)  # at most, between Prefect's machine and this one
SHORT_PIECE = 3  # characters of an address's parts that are no secret, such as `api` and `/`

# Slack and compatible chats need these three characters escaped: `<!channel>` would notify everyone.
ESCAPED = "| replace('&', '&amp;') | replace('<', '&lt;') | replace('>', '&gt;')"
RUNS = {"prefect.resource.id": "prefect.flow-run.*"}
RUN = "{{ flow.name }} {{ flow_run.name }}: {{ flow_run.state.name }}"
MESSAGE = (
    f"{{% if flow_run.state.message %}}: {{{{ flow_run.state.message | truncate({MESSAGE_CHARACTERS}) }}}}{{% endif %}}"
)


def ensure_notifications(
    url: SecretStr,
    *,
    flows: Sequence[str] = TRAINING_FLOWS,
    everything: bool = False,
    stale_after: timedelta,
    stale_flow: str = "retrain",
) -> list[str]:
    """Creates the automations that send messages to a chat; a second call changes only what differs.

    Args:
        url: webhook that accepts `{"text": ...}` by POST, as Slack's, Mattermost's and many others do.
        flows: names of the flows whose lost runs are reported.
        everything: also report trial runs, mistakes (exit status 2), interrupted runs, and versions that were
            registered but not to be promoted.
        stale_after: longest time of `stale_flow` without a successful run, or without any run; the message is repeated
            every second such time.

    Returns:
        Names of the automations.
    """
    block = Webhook(url=url, headers={"Content-Type": "application/json"}).save(BLOCK, overwrite=True)
    assert isinstance(block, UUID)  # not a coroutine, since this is no coroutine
    wanted = [_on_event(name, kind, block, everything=everything) for name, kind in EVENTS.items()]
    for name, (states, reported) in STATES.items():
        wanted.append(_on_end(name, states, "" if everything and name == CRASHED else reported, flows, block))
    wanted.append(_on_silence(stale_flow, stale_after, block))
    with get_client(sync_client=True) as client:
        for automation in wanted:
            _ensure(client, automation)
        _remove(client, EARLIER)
    return [automation.name for automation in wanted]


def address_in(name: str) -> SecretStr:
    """Returns the address in a block of Prefect's of type Webhook.

    Raises:
        UsageError: there is no such block.
    """
    try:
        url: SecretStr = Webhook.load(name).url  # type: ignore[union-attr]
    except ValueError:
        raise UsageError(f"Prefect has no block {name} of type Webhook; make one on its page Blocks") from None
    return url


def is_in_use(url: SecretStr) -> bool:
    """Returns whether messages go to this address already."""
    with suppress(UsageError):
        return address_in(BLOCK) == url
    return False


def remove_notifications() -> list[str]:
    """Deletes all automations and the address; returns the names of the deleted automations."""
    with get_client(sync_client=True) as client:
        removed = _remove(client, (*EVENTS, *STATES, STALE, *EARLIER))
        try:
            block = client.read_block_document_by_name(BLOCK, Webhook.get_block_type_slug(), include_secrets=False)
        except ObjectNotFound:
            return removed
        assert block.id is not None
        client.delete_block_document(block.id)
    return removed


def send_test(host: str = "") -> str:
    """Sends a test message, in the way of all others; returns the receiver's answer as one line, without the address.

    Args:
        host: machine that the message names as its sender.

    Raises:
        UsageError: there are no notifications.
        ServiceError: the receiver refused the message, could not be reached or has not answered.
    """
    with get_client(sync_client=True) as client:
        if not client.read_automations_by_name(TEST):
            raise UsageError("there are no notifications yet: set CONVOY_NOTIFY_URL to the address of a webhook")
        secret = Webhook.load(BLOCK).url.get_secret_value()  # type: ignore[union-attr]
        event = emit(client, "test", f"Convoy sends its messages here{f' from {host}' if host else ''}: this is a test")
        wanted = EventFilter(
            occurred=EventOccurredFilter(since=event.occurred - CLOCKS_DIFFER, until=event.occurred + CLOCKS_DIFFER),
            event=EventNameFilter(name=list(ACTION_ENDS)),
            related=EventRelatedFilter(id=[f"prefect.event.{event.id}"]),
        )
        deadline = time.monotonic() + ANSWER_SECONDS
        while not (found := client.read_events(wanted, limit=1).events):
            if time.monotonic() > deadline:
                raise ServiceError(f"Prefect has not reported an answer within {ANSWER_SECONDS:.0f} s")
            stopping.sleep(POLL_SECONDS)
    answer = found[0].payload
    if "status_code" not in answer:
        raise ServiceError(f"the test message did not arrive: {_without(secret, str(answer.get('reason')))}")
    status, body = answer["status_code"], _without(secret, answer.get("response_body") or "")
    said = f"the receiver answered {status}{f': {body}' if body else ''}"
    if not 200 <= status < 300:
        raise ServiceError(said)
    return said


def _without(secret: str, text: str) -> str:
    """Returns a text as one short line, without any part of the webhook's address, which an answer may repeat."""
    parts = urlsplit(secret)
    pieces = {secret, parts.path, *parts.path.split("/"), parts.query, parts.password or ""}
    for piece in sorted(pieces, key=len, reverse=True):
        if len(piece) > SHORT_PIECE:
            text = text.replace(piece, "…")
    return one_line(text)[:ANSWER_CHARACTERS]


def _on_event(name: str, kind: Kind, block: UUID, *, everything: bool) -> AutomationCore:
    expect = {event_name(kind)}
    if everything:
        kinds: tuple[Kind, ...] = (kind, "registered") if kind == "promoted" else (kind,)
        expect |= {event_name(each, minor=minor) for each in kinds for minor in (False, True)}
    return _automation(
        name,
        f"{' or '.join(sorted(expect))} is emitted",
        "{{ event.payload.text }}",
        block,
        match={"prefect.resource.id": "*"},
        expect=expect,
        posture=Posture.Reactive,
        within=timedelta(0),  # each event triggers by itself
    )


def _on_end(name: str, states: Sequence[str], reported: str, flows: Sequence[str], block: UUID) -> AutomationCore:
    return _automation(
        name,
        f"a run of {' or '.join(flows)} ends as {' or '.join(states)} and could not report that by itself",
        f"{RUN}{MESSAGE}\n{_run_url()}",
        block,
        match=RUNS | ({"prefect.state-message": f"!{reported}"} if reported else {}),
        match_related=_of_flows(flows),
        expect={f"prefect.flow-run.{state}" for state in states},
        posture=Posture.Reactive,
        within=timedelta(0),
    )


def _on_silence(flow: str, after: timedelta, block: UUID) -> AutomationCore:
    success = {f"prefect.flow-run.{state}" for state in SUCCESS_STATES}
    last = f"{{% if flow_run %}}; the last run that did: {{{{ flow_run.name }}}}\n{_run_url()}{{% endif %}}"
    return _automation(
        STALE,
        f"no run of {flow} has completed for {_span(after)}",
        f"{flow} has not completed for {_span(after)}{last}",
        block,
        match=RUNS,
        match_related=_of_flows([flow]),
        # Since success is expected after success, each success restarts the span. Without `after`, spans would follow
        # one another regardless of events, and a silence would be noticed after up to twice the span.
        after=success,
        expect=success,
        posture=Posture.Proactive,
        within=after,
    )


def _automation(name: str, when: str, text: str, block: UUID, **trigger: Any) -> AutomationCore:
    """Returns an automation that posts a text at events; the template encodes values as JSON."""
    payload = f'{{% set text %}}{text}{{% endset %}}{{"text": {{{{ text {ESCAPED} | tojson }}}}}}'
    return AutomationCore(
        name=name,
        description=f"Reports when {when}.",
        trigger=EventTrigger(threshold=1, **trigger),
        actions=[CallWebhook(block_document_id=block, payload=payload)],
    )


def _of_flows(names: Sequence[str]) -> Any:
    return {"prefect.resource.role": "flow", "prefect.resource.name": list(names)}


def _run_url() -> str:
    """Returns the template of a flow run's URL, with Prefect's address here: its server may not know its own."""
    some_run = UUID(int=0)  # a template in its place would be escaped
    return page_of(some_run).replace(str(some_run), "{{ flow_run.id }}")


def _span(time: timedelta) -> str:
    for unit, length in (("days", timedelta(days=1)), ("hours", timedelta(hours=1))):
        if time >= 2 * length:
            return f"{time / length:g} {unit}"
    return f"{time.total_seconds():g} seconds"


def _ensure(client: SyncPrefectClient, wanted: AutomationCore) -> None:
    """Creates an automation, or updates the one of that name if it differs."""
    found = client.read_automations_by_name(wanted.name)
    if not found:
        client.create_automation(wanted)
        return
    first, *others = found
    for other in others:  # created by simultaneous calls
        client.delete_automation(other.id)
    if AutomationCore.model_validate(first.model_dump(exclude={"id"})) != wanted:
        client.update_automation(first.id, wanted)


def _remove(client: SyncPrefectClient, names: Sequence[str]) -> list[str]:
    """Deletes automations; returns the names of those that there were."""
    removed = []
    for name in names:
        for automation in client.read_automations_by_name(name):
            client.delete_automation(automation.id)
            removed.append(name)
    return removed
