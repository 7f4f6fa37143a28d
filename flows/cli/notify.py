"""The command `notify`: sends messages about trainings to a chat."""

import os
import socket
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer
from pydantic import SecretStr

from flows.cli.console import loading, print_line, servers_up
from infra.errors import UsageError

if TYPE_CHECKING:
    from tasks.config.deployment import NotificationConfig

MIN_SPAN = timedelta(seconds=10)  # the least that Prefect accepts
STALE_AFTER = 7.0  # days


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
    ] = STALE_AFTER,
    everything: Annotated[
        bool,
        typer.Option(
            "--all",
            help="Also about trial runs (`--limit`), your mistakes (exit status 2), interrupted runs, and versions "
            "that were registered with promote=false.",
        ),
    ] = False,
    test: Annotated[
        bool,
        typer.Option(
            "--test",
            help="Send a test message, and print the receiver's answer. Without an address: to the one in use.",
        ),
    ] = False,
    off: Annotated[bool, typer.Option("--off", help="Stop the messages and delete the address in Prefect.")] = False,
) -> None:
    """Send a message to a chat when a version is promoted, refused or waits for approval, and when trainings fail.

    Prefect's server sends the messages, so it must reach the address. A second call changes only what differs.

    [dim]CONVOY_NOTIFY_URL=https://… convoy notify --stale-after 3 --test[/]
    """
    if off and test:
        raise UsageError("--off and --test exclude each other")
    if url is None and not off and not test:
        raise UsageError("no address: set CONVOY_NOTIFY_URL to the address of a webhook, or give --off or --test")
    span = _checked(None if off else url, stale_after)
    servers_up(only=["prefect"])
    with loading():
        from tasks.orchestration.notifications import ensure_notifications, is_in_use, remove_notifications, send_test

    if off:
        removed = remove_notifications()
        print_line(f"removed {', '.join(removed)}" if removed else "There were no notifications.")
        return
    # A mere test takes nothing back that an earlier call, or a project, has chosen.
    chosen = not test or everything or stale_after != STALE_AFTER
    if url is not None and (chosen or not is_in_use(SecretStr(url))):
        for name in ensure_notifications(SecretStr(url), everything=everything, stale_after=span):
            print_line(name)
    if test:
        print_line(f"test message sent; {send_test(socket.gethostname())}")


def webhook_of(notification: "NotificationConfig") -> SecretStr | str | None:
    """Returns the address in the variable that a project names, or the name of its block in Prefect; None: neither.

    Raises:
        UsageError: the variable is not set, or the address or the time is invalid.
    """
    url = os.environ.get(notification.variable) if notification.variable else None
    if notification.variable and not url:
        raise UsageError(f"deploy.notification.variable: {notification.variable} is not set here")
    _checked(url, notification.stale_after)
    return SecretStr(url) if url else notification.block


def set_up_notifications(webhook: SecretStr | str, notification: "NotificationConfig") -> list[str]:
    """Does what `convoy notify` does for a project; returns the names of the automations."""
    from tasks.orchestration.notifications import address_in, ensure_notifications

    url = address_in(webhook) if isinstance(webhook, str) else webhook
    span = _checked(url.get_secret_value(), notification.stale_after)
    return ensure_notifications(url, everything=notification.everything, stale_after=span)


def _checked(url: str | None, stale_after: float) -> timedelta:
    """Returns the time after which to warn.

    Raises:
        UsageError: the time or the address is invalid; the message does not repeat the address, which is a secret.
    """
    if url is not None:
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise UsageError("the webhook's address must start with http:// or https:// and name a host")
    try:
        span = timedelta(days=stale_after)
    except (OverflowError, ValueError):
        raise UsageError(f"--stale-after {stale_after}: give a number of days") from None
    if span < MIN_SPAN:
        raise UsageError(f"--stale-after {stale_after:g}: the time must be at least {MIN_SPAN.seconds} seconds")
    return span
