"""Prefect automations that send messages to a chat when flow runs end, or when a flow has not succeeded for long.

The webhook's address is a secret: it gives write access to the chat. Prefect stores it encrypted in a block. Prefect
has two kinds of webhook block. The one for notifications would write the address into the server's log when the
receiver answers with an error, and would repeat a message that may have arrived. The plain one, used here, does
neither: a message is sent once, and the answer is among the automation's events in Prefect. (Of two simultaneous
messages, Prefect may record one as failed with a ReadError although it arrived: they share a connection pool, which
the first to end closes.)
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

from prefect import get_client
from prefect.automations import AutomationCore, EventTrigger, Posture
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient
from prefect.events.actions import CallWebhook
from prefect.exceptions import ObjectNotFound
from prefect.utilities.urls import url_for
from pydantic import SecretStr

from infra.errors import UsageError

BLOCK = "convoy-notifications"
PREFIX = "convoy: "
COMPLETED, REFUSED, FAILED, STALE = (f"{PREFIX}{word}" for word in ("completed", "refused", "failed", "stale"))
STATES = {COMPLETED: ("Completed",), REFUSED: ("Refused",), FAILED: ("Failed", "Crashed", "TimedOut")}
"""Names of the states that each automation reports; an event is named after the state's name, not its type."""

SUCCESS_STATES = ("Completed", "Skipped")  # Skipped: a retraining without a reason to train has succeeded too
MIN_SPAN = timedelta(seconds=10)  # the least that Prefect accepts
MESSAGE_CHARACTERS = 1000  # of a state's message: an exception's message may be a whole page

# Slack and compatible chats need these three characters escaped: `<!channel>` would notify everyone.
ESCAPED = "| replace('&', '&amp;') | replace('<', '&lt;') | replace('>', '&gt;')"
RUN = "{{ flow.name }} {{ flow_run.name }}: {{ flow_run.state.name }}"
MESSAGE = (
    f"{{% if flow_run.state.message %}}: {{{{ flow_run.state.message | truncate({MESSAGE_CHARACTERS}) }}}}{{% endif %}}"
)


def ensure_notifications(
    url: SecretStr,
    *,
    flows: Sequence[str] = ("retrain", "train"),
    stale_after: timedelta,
    stale_flow: str = "retrain",
) -> list[str]:
    """Creates the automations that send messages to a chat; a second call changes only what differs.

    Args:
        url: webhook that accepts `{"text": ...}` by POST, as Slack's, Mattermost's and many others do.
        flows: names of the flows whose ends are reported.
        stale_after: longest time of `stale_flow` without a successful run, or without any run; the message is repeated
            every second such time.

    Returns:
        Names of the automations.

    Raises:
        UsageError: the address or the time is invalid; the message does not repeat the address.
    """
    parts = urlsplit(url.get_secret_value())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError("the webhook's address must start with http:// or https:// and name a host")
    if stale_after < MIN_SPAN:
        raise UsageError(f"the time after which to warn must be at least {MIN_SPAN.seconds} seconds")
    block = Webhook(url=url, headers={"Content-Type": "application/json"}).save(BLOCK, overwrite=True)
    assert isinstance(block, UUID)  # not a coroutine, since this is no coroutine
    wanted = [_on_end(name, states, flows, block) for name, states in STATES.items()]
    wanted.append(_on_silence(stale_flow, stale_after, block))
    with get_client(sync_client=True) as client:
        for automation in wanted:
            _ensure(client, automation)
    return [automation.name for automation in wanted]


def remove_notifications() -> list[str]:
    """Deletes all automations and the address; returns the names of the deleted automations."""
    removed = []
    with get_client(sync_client=True) as client:
        for name in (*STATES, STALE):
            for automation in client.read_automations_by_name(name):
                client.delete_automation(automation.id)
                removed.append(name)
        try:
            block = client.read_block_document_by_name(BLOCK, Webhook.get_block_type_slug(), include_secrets=False)
        except ObjectNotFound:
            return removed
        assert block.id is not None
        client.delete_block_document(block.id)
    return removed


def _on_end(name: str, states: Sequence[str], flows: Sequence[str], block: UUID) -> AutomationCore:
    return _automation(
        name,
        f"a run of {' or '.join(flows)} ends as {' or '.join(states)}",
        f"{RUN}{MESSAGE}\n{_run_url()}",
        flows,
        block,
        expect={f"prefect.flow-run.{state}" for state in states},
        posture=Posture.Reactive,
        within=timedelta(0),  # each event triggers by itself
    )


def _on_silence(flow: str, after: timedelta, block: UUID) -> AutomationCore:
    success = {f"prefect.flow-run.{state}" for state in SUCCESS_STATES}
    last = f"{{% if flow_run %}}; the last run that did: {{{{ flow_run.name }}}}\n{_run_url()}{{% endif %}}"
    return _automation(
        STALE,
        f"no run of {flow} has completed for {_span(after)}",
        f"{flow} has not completed for {_span(after)}{last}",
        [flow],
        block,
        # Since success is expected after success, each success restarts the span. Without `after`, spans would follow
        # one another regardless of events, and a silence would be noticed after up to twice the span.
        after=success,
        expect=success,
        posture=Posture.Proactive,
        within=after,
    )


def _automation(name: str, when: str, text: str, flows: Sequence[str], block: UUID, **trigger: Any) -> AutomationCore:
    """Returns an automation that posts a text at events of these flows' runs; the template encodes values as JSON."""
    payload = f'{{% set text %}}{text}{{% endset %}}{{"text": {{{{ text {ESCAPED} | tojson }}}}}}'
    runs = {"prefect.resource.id": "prefect.flow-run.*"}
    of_flows: Any = {"prefect.resource.role": "flow", "prefect.resource.name": list(flows)}
    return AutomationCore(
        name=name,
        description=f"Reports when {when}.",
        trigger=EventTrigger(match=runs, match_related=of_flows, threshold=1, **trigger),
        actions=[CallWebhook(block_document_id=block, payload=payload)],
    )


def _run_url() -> str:
    """Returns the template of a flow run's URL, with Prefect's address here: its server may not know its own."""
    some_run = UUID(int=0)  # a template in its place would be escaped
    address = url_for("flow-run", obj_id=some_run)
    return address.replace(str(some_run), "{{ flow_run.id }}") if address else "{{ flow_run | ui_url }}"


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
