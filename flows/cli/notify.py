"""The command `notify`: sends messages to a chat when flow runs end."""

from datetime import timedelta
from typing import Annotated

import typer
from pydantic import SecretStr

from flows.cli.console import loading, print_line, servers_up
from infra.errors import UsageError


def notify(
    url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            envvar="CONVOY_NOTIFY_URL",
            show_default=False,
            help="Webhook that accepts Slack's messages. It is a secret: use the variable.",
        ),
    ] = None,
    stale_after: Annotated[
        float, typer.Option(metavar="DAYS", help="Also send a message if `retrain` has not completed for this long.")
    ] = 7.0,
    off: Annotated[bool, typer.Option("--off", help="Stop the messages and delete the address in Prefect.")] = False,
) -> None:
    """Send a message to a chat when a run of `retrain` or `train` completes, is refused or fails, or none completes.

    Prefect's server sends the messages, so it must reach the address. A second call changes only what differs.

    [dim]CONVOY_NOTIFY_URL=https://… convoy notify --stale-after 3[/]
    """
    if url is None and not off:
        raise UsageError("no address: set CONVOY_NOTIFY_URL to the address of a webhook, or give --off")
    try:
        span = timedelta(days=stale_after)
    except (OverflowError, ValueError):
        raise UsageError(f"--stale-after {stale_after}: give a number of days") from None
    servers_up()
    with loading():
        from tasks.orchestration.notifications import ensure_notifications, remove_notifications

    if off:
        removed = remove_notifications()
        print_line(f"removed {', '.join(removed)}" if removed else "There were no notifications.")
        return
    assert url is not None
    for name in ensure_notifications(SecretStr(url), stale_after=span):
        print_line(name)
