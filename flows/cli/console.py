"""What all commands share: servers, messages while things load, and how results and errors are printed."""

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from infra.errors import Outage, ServiceError, UsageError, one_line, without_login
from infra.settings import Settings

if TYPE_CHECKING:
    from httpx import HTTPStatusError

    from infra.stack.state import ServerName

SAID = 300  # characters of a server's answer
FULL_DISK = ("No space left on device", "unexpected pos ")
"""In errors of Python's own and of libraries in other languages; the second of torch, where it could not write."""


def servers_up(*, only: "Collection[ServerName] | None" = None) -> None:
    """Have the servers running, and tell every client of this process, and of those it starts, where they are.

    Args:
        only: those that are needed; None for all.
    """
    from infra.stack.local_stack import up
    from infra.stack.state import SERVER_NAMES

    console = terminal(error=True)
    endpoints = up(
        Settings(), lambda event: console.print(event, style="dim"), only=SERVER_NAMES if only is None else only
    )
    endpoints.apply()


def loading() -> AbstractContextManager[object]:
    """Says that imports take a while."""
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")  # its tracebacks stay in its UI
    return terminal(error=True).status("Loading torch, Prefect and MLflow …")


def terminal(*, error: bool = False, width: int | None = None, soft_wrap: bool = False) -> Console:
    """Returns the console for all output, which prints texts as they are, since names of files may look like markup.

    Colours are for `rich.text.Text`.
    """
    return Console(stderr=error, width=width, soft_wrap=soft_wrap, highlight=False, markup=False, emoji=False)


def print_pairs(lines: Mapping[str, str | Text]) -> None:
    """Prints names and values side by side; never shortened, so that addresses can be clicked and copied."""
    width = max(map(len, lines))
    console = terminal(soft_wrap=True)
    for key, value in lines.items():
        console.print(Text.assemble((f"{key:{width}}", "bold"), "  ", value))


def say(line: str, *, error: bool = False) -> None:
    """Prints a line as it is, whole; an error goes to standard error."""
    terminal(error=error, soft_wrap=True).print(line)


def foreseen(error: BaseException) -> BaseException:
    """Returns the error, or a one-line error if Prefect refuses or is gone, its settings are wrong, or a disk is full.

    Only Prefect's client lets such errors through: those of the other servers are translated where they are asked.
    """
    from httpx import HTTPStatusError, TransportError
    from pydantic import ValidationError
    from pydantic_settings import SettingsError

    if hasattr(error, "exit_status"):
        return error
    for each in _causes(error):
        if isinstance(each, HTTPStatusError):
            return ServiceError(_refusal(each))
        reason = str(each) if isinstance(each, SettingsError) else ""
        if isinstance(each, ValidationError) and each.title.endswith("Settings"):
            first = each.errors()[0]
            reason = f"{each.title}, {'.'.join(map(str, first['loc']))}: {first['msg']}"
        if reason:
            return UsageError(
                f"Prefect cannot use its settings ({one_line(reason)}); they are in PREFECT_ variables, its "
                "profile, and .env, prefect.toml and pyproject.toml of the working folder"
            )
        if isinstance(each, TransportError):
            address = without_login(os.environ.get("PREFECT_API_URL", "")) or "its address"
            return Outage(
                f"Prefect at {address} does not answer ({describe(each)}); "
                "start it with `convoy up`, or correct PREFECT_API_URL"
            )
        if any(words in str(each) for words in FULL_DISK):
            where = f" for {each.filename}" if isinstance(each, OSError) and each.filename else ""
            return ServiceError(f"no space left on the disk{where}; free some (`convoy prune` may help) and try again")
    return error


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yields an error, those in it if it is a group, and what caused them."""
    yield error
    for inner in (*getattr(error, "exceptions", ()), error.__cause__):
        if inner is not None:
            yield from _causes(inner)


def _refusal(error: "HTTPStatusError") -> str:
    asked, status = error.request.url, error.response.status_code
    server = f"Prefect at {asked.scheme}://{asked.netloc.decode()}"
    if status in (401, 403):
        return (
            f"{server} does not let you in ({status}): check PREFECT_API_AUTH_STRING, "
            "or PREFECT_API_KEY for Prefect Cloud"
        )
    try:
        said = error.response.json()
        said = said.get("exception_message") or said.get("detail") or said
    except (ValueError, AttributeError):
        said = error.response.text
    said = one_line(said)
    return f"{server} answered {asked.path} with status {status}: {said[:SAID]}{'…' if len(said) > SAID else ''}"


def exit_status(error: BaseException) -> int:
    """What the command exits with because of an error; `convoy --help` lists them."""
    return int(getattr(error, "exit_status", 1))


def describe(error: BaseException) -> str:
    """The error as one line."""
    text = one_line(error)
    known = hasattr(error, "exit_status")
    return text if known and text else f"{type(error).__name__}: {text}".rstrip(": ")
