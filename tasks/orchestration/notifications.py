"""Messages to a chat about how flow runs end, and about a flow that has not ended well for long: Prefect automations.

The webhook's address is a secret, since whoever knows it may write to the chat; Prefect keeps it encrypted in a block.
Of Prefect's two kinds of webhook block, the one for notifications would write the address into the server's log when
the receiver answers with an error, and would send again what may have arrived. The plain one that we use does neither:
a message is sent once, and what was answered is among the automation's events in Prefect. (Of two messages at the same
moment, Prefect may note one as failed with a ReadError although it arrived: they share a connection pool, which the
first to end closes.)
"""

from collections.abc import Sequence
from datetime import timedelta
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
ENDS = {COMPLETED: ("Completed",), REFUSED: ("Refused",), FAILED: ("Failed", "Crashed", "TimedOut")}
"""Names of the states that each automation tells of; an event is named after the state's name, not its type."""

WELL = ("Completed", "Skipped")
"""States that show that retraining works: a run that found nothing to do is as good as one that promoted."""

SHORTEST = timedelta(seconds=10)  # Prefect takes no shorter span
LONGEST_MESSAGE = 1000  # characters of a state's message: an exception's may be a whole page

# Slack, and those who speak like it, want these three characters escaped: `<!channel>` would call everyone.
ESCAPED = "| replace('&', '&amp;') | replace('<', '&lt;') | replace('>', '&gt;')"
RUN = "{{ flow.name }} {{ flow_run.name }}: {{ flow_run.state.name }}"
MESSAGE = (
    f"{{% if flow_run.state.message %}}: {{{{ flow_run.state.message | truncate({LONGEST_MESSAGE}) }}}}{{% endif %}}"
)


def ensure_notifications(
    url: SecretStr,
    *,
    flows: Sequence[str] = ("retrain", "train"),
    stale_after: timedelta,
    stale_flow: str = "retrain",
) -> list[str]:
    """Have Prefect tell a chat how flow runs end; doing it again changes what differs, and nothing else.

    Args:
        url: webhook that takes `{"text": ...}` by POST, as Slack's, Mattermost's and many others do.
        flows: names of the flows of which to tell.
        stale_after: how long `stale_flow` may go without a run that ended well, or without any run; while that lasts,
            it is told again every second span.

    Returns:
        Names of the automations.

    Raises:
        UsageError: the address or the span cannot be used; the address is not repeated.
    """
    parts = urlsplit(url.get_secret_value())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError("the webhook's address must start with http:// or https:// and name a host")
    if stale_after < SHORTEST:
        raise UsageError(f"the time after which to warn must be at least {SHORTEST.seconds} seconds")
    block = Webhook(url=url, headers={"Content-Type": "application/json"})
    saved = block.save(BLOCK, overwrite=True)
    assert isinstance(saved, UUID)  # not a coroutine, since we are not in one
    wanted = [_on_end(name, states, flows, saved) for name, states in ENDS.items()]
    wanted.append(_on_silence(stale_flow, stale_after, saved))
    with get_client(sync_client=True) as client:
        for automation in wanted:
            _ensure(client, automation)
    return [automation.name for automation in wanted]


def remove_notifications() -> list[str]:
    """Delete all of it, the address included; returns the names of the automations that there were."""
    removed = []
    with get_client(sync_client=True) as client:
        for name in (*ENDS, STALE):
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
    text = f"{RUN}{MESSAGE}\n{_run_url()}"
    trigger = EventTrigger(
        expect={f"prefect.flow-run.{state}" for state in states},
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related=_of(flows),
        posture=Posture.Reactive,
        threshold=1,
        within=timedelta(0),  # each event by itself
    )
    return AutomationCore(
        name=name,
        description=f"Tells when a run of {' or '.join(flows)} ends as {' or '.join(states)}.",
        trigger=trigger,
        actions=[_tell(text, block)],
    )


def _on_silence(flow: str, after: timedelta, block: UUID) -> AutomationCore:
    ends_well = {f"prefect.flow-run.{state}" for state in WELL}
    text = f"{flow} has not completed for {_span(after)}"
    last = f"{{% if flow_run %}}; the last run that did: {{{{ flow_run.name }}}}\n{_run_url()}{{% endif %}}"
    trigger = EventTrigger(
        # Expected after itself, each such end starts the span anew; without `after`, spans would follow one another
        # whatever happens in them, and a silence would be noticed after up to twice the span.
        after=ends_well,
        expect=ends_well,
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related=_of([flow]),
        posture=Posture.Proactive,
        threshold=1,
        within=after,
    )
    return AutomationCore(
        name=STALE,
        description=f"Tells when no run of {flow} has completed for {_span(after)}.",
        trigger=trigger,
        actions=[_tell(text + last, block)],
    )


def _of(flows: Sequence[str]) -> dict[str, str | list[str]]:
    return {"prefect.resource.role": "flow", "prefect.resource.name": list(flows)}


def _tell(text: str, block: UUID) -> CallWebhook:
    """Post a text; the template makes JSON of it, whatever the values hold."""
    payload = f'{{% set text %}}{text}{{% endset %}}{{"text": {{{{ text {ESCAPED} | tojson }}}}}}'
    return CallWebhook(block_document_id=block, payload=payload)


def _run_url() -> str:
    """Template of a flow run's page, at the address that Prefect has here: its server may not know its own."""
    some_run = UUID(int=0)  # a template would be escaped
    address = url_for("flow-run", obj_id=some_run)
    return address.replace(str(some_run), "{{ flow_run.id }}") if address else "{{ flow_run | ui_url }}"


def _span(time: timedelta) -> str:
    for unit, length in (("days", timedelta(days=1)), ("hours", timedelta(hours=1))):
        if time >= 2 * length:
            return f"{time / length:g} {unit}"
    return f"{time.total_seconds():g} seconds"


def _ensure(client: SyncPrefectClient, wanted: AutomationCore) -> None:
    """Create an automation, or make the one of its name as wanted; one that is so already is left alone."""
    found = client.read_automations_by_name(wanted.name)
    if not found:
        client.create_automation(wanted)
        return
    first, *others = found
    for other in others:  # two who did this at once
        client.delete_automation(other.id)
    if AutomationCore.model_validate(first.model_dump(exclude={"id"})) != wanted:
        client.update_automation(first.id, wanted)
