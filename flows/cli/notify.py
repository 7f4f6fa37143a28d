"""The command `notify`: messages to a chat about how flow runs end."""

from datetime import timedelta
from typing import Annotated

import typer
from pydantic import SecretStr

from flows.cli.console import loading, say, servers_up
from infra.errors import UsageError


def notify(
    url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            envvar="CONVOY_NOTIFY_URL",
            show_default=False,
            help="Webhook that takes what Slack's do. It is a secret: rather give it by the variable.",
        ),
    ] = None,
    stale_after: Annotated[
        float, typer.Option(metavar="DAYS", help="Also tell when `retrain` has not completed for so long.")
    ] = 7.0,
    off: Annotated[bool, typer.Option("--off", help="No more messages; Prefect forgets the address.")] = False,
) -> None:
    """Have Prefect tell a chat when a run of `retrain` or `train` completes, is refused or fails, or none completes.

    Prefect's server sends the messages, so it must reach the address. Doing it again changes what differs.

    [dim]CONVOY_NOTIFY_URL=https://… convoy notify --stale-after 3[/]
    """
    if url is None and not off:
        raise UsageError("where to? Set CONVOY_NOTIFY_URL to the address of a webhook, or give --off")
    servers_up()
    with loading():
        from tasks.orchestration.notifications import ensure_notifications, remove_notifications

    if off:
        removed = remove_notifications()
        say(f"removed {', '.join(removed)}" if removed else "There were no notifications.")
        return
    assert url is not None
    for name in ensure_notifications(SecretStr(url), stale_after=_days(stale_after)):
        say(name)


def _days(number: float) -> timedelta:
    try:
        return timedelta(days=number)
    except (OverflowError, ValueError):
        raise UsageError(f"--stale-after {number}: give a number of days") from None
