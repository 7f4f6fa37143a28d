"""What all commands share: servers, messages while things load, and how results and errors are printed."""

import os
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from rich.console import Console

from infra.errors import ServiceError
from infra.settings import Settings

if TYPE_CHECKING:
    from infra.stackfolder import ServerName


def servers_up(*, only: "Collection[ServerName] | None" = None) -> None:
    """Have the servers running, and tell every client of this process, and of those it starts, where they are.

    Args:
        only: those that are needed; None for all.
    """
    from infra.stack import NAMES, up

    console = Console(stderr=True, highlight=False)
    endpoints = up(Settings(), lambda event: console.print(event, style="dim"), only=NAMES if only is None else only)
    os.environ.update(endpoints.environment())


def loading() -> AbstractContextManager[object]:
    """Says that imports take a while."""
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")  # its tracebacks stay in its UI
    return Console(stderr=True).status("Loading torch, Prefect and MLflow …")


def print_pairs(lines: Mapping[str, str]) -> None:
    """Names and values side by side; never shortened, so that addresses can be clicked and copied."""
    width = max(map(len, lines))
    console = Console(soft_wrap=True, highlight=False)
    for key, value in lines.items():
        console.print(f"[bold]{key:{width}}[/]  {value}")


def say(line: str, *, error: bool = False) -> None:
    """Print a line as it is, whole; an error goes to standard error."""
    Console(stderr=error, soft_wrap=True, highlight=False, markup=False).print(line)


def foreseen(error: BaseException) -> BaseException:
    """The error itself; or one line of ours, if it is Prefect's that it does not let us in."""
    from httpx import HTTPStatusError

    if isinstance(error, HTTPStatusError) and error.response.status_code in (401, 403):
        # Only Prefect's client lets these through: those of the other servers are translated where they are asked.
        asked = error.request.url
        return ServiceError(
            f"Prefect at {asked.scheme}://{asked.netloc.decode()} does not let you in "
            f"({error.response.status_code}): check PREFECT_API_AUTH_STRING, or PREFECT_API_KEY for Prefect Cloud"
        )
    return error


def exit_status(error: BaseException) -> int:
    """What the command exits with because of an error; `convoy --help` lists them."""
    return int(getattr(error, "exit_status", 1))


def one_line(error: BaseException) -> str:
    """The error as one line."""
    text = " ".join(str(error).split())
    known = hasattr(error, "exit_status")
    return text if known and text else f"{type(error).__name__}: {text}".rstrip(": ")
