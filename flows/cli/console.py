"""Functions that all commands share: starting servers, and printing results and errors."""

import json
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic_core import to_jsonable_python
from rich.console import Console, RenderableType
from rich.text import Text

from infra.errors import Outage, ServiceError, UsageError, one_line, without_login
from infra.settings import Settings
from tasks.config.project import project_file

if TYPE_CHECKING:
    from httpx import HTTPStatusError

    from infra.stack.endpoints import Endpoints
    from infra.stack.state import ServerName

ANSWER_CHARACTERS = 300  # of a server's answer, in an error line
MOST_COLUMNS = 10_000  # of a table that is printed whole
DISK_FULL_TEXTS = ("No space left on device", "unexpected pos ")
"""Parts of error messages: of Python and of native libraries, and of torch when it could not write."""

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]


def servers_up(*, only: "Collection[ServerName] | None" = None) -> None:
    """Starts the servers (all, or `only` some) that are not running, and puts their addresses into the environment."""
    from infra.stack.local_stack import up
    from infra.stack.state import SERVER_NAMES

    console = terminal(error=True)
    endpoints = up(
        Settings(), lambda event: console.print(event, style="dim"), only=SERVER_NAMES if only is None else only
    )
    _apply(endpoints)


def servers_to_read(only: "Collection[ServerName]" = ("seaweedfs", "mlflow")) -> None:
    """Puts the servers' addresses into the environment, for a command that only reads.

    Args:
        only: those without which the command can do nothing.

    Raises:
        ServiceError: one of these does not run; none is started.
    """
    from infra.stack.local_stack import running

    _apply(running(Settings(), only=only))


def _apply(endpoints: "Endpoints") -> None:
    """Puts addresses into the environment, and into the settings of a Prefect that is loaded already.

    The checks before servers load Prefect, as a program may: it has read the environment without an address, and would
    start a temporary server of its own for each flow.
    """
    endpoints.apply()
    if context := sys.modules.get("prefect.context"):
        context.refresh_global_settings_context()


def loading() -> AbstractContextManager[object]:
    """Shows a status line while slow imports run."""
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")  # tracebacks are shown in its UI only
    return terminal(error=True).status("Loading torch, Prefect and MLflow …")


def terminal(*, error: bool = False, width: int | None = None, soft_wrap: bool = False) -> Console:
    """Returns a console that prints texts unchanged, since file names may look like markup; `Text` has colours."""
    return Console(stderr=error, width=width, soft_wrap=soft_wrap, highlight=False, markup=False, emoji=False)


def print_pairs(lines: Mapping[str, str | Text]) -> None:
    """Prints names and values side by side, never shortened, so that addresses can be clicked and copied."""
    width = max(map(len, lines))
    console = terminal(soft_wrap=True)
    for key, value in lines.items():
        console.print(Text.assemble((f"{key:{width}}", "bold"), "  ", value))


def print_whole(table: RenderableType) -> None:
    """Prints a table as wide as it is, even on a narrow terminal, since people and scripts copy ids and names."""
    width = terminal(width=MOST_COLUMNS).measure(table).maximum
    terminal(width=max(width, terminal().width)).print(table)


def print_json(found: Any) -> None:
    """Prints a record, or any lists and dictionaries of records and plain values, as JSON in ASCII; None is null."""
    plain = to_jsonable_python(to_jsonable_python(found), inf_nan_mode="null")  # records keep their own mode
    typer.echo(json.dumps(plain, indent=2))


def configuration_file(given: Path | None) -> Path | None:
    """Returns the file of the configuration: the given one, else the `convoy.yaml` here, which a line then names."""
    if given is None and (file := project_file()):
        print_line(f"configuration: {file}", error=True)
        return file
    return given


def print_line(line: str, *, error: bool = False) -> None:
    """Prints a line unchanged and whole, to standard error if `error`."""
    terminal(error=error, soft_wrap=True).print(line)


def as_known_error(error: BaseException) -> BaseException:
    """Returns a one-line error if Prefect refuses, is down or has wrong settings, or a disk is full; else the error.

    Only Prefect's client raises such errors here; errors of the other servers are translated by the code that calls
    them.
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
        if any(text in str(each) for text in DISK_FULL_TEXTS):
            where = f" for {each.filename}" if isinstance(each, OSError) and each.filename else ""
            return ServiceError(f"no space left on the disk{where}; free some (`convoy prune` may help) and try again")
    return error


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yields an error, the members of a group, and the causes of all of them."""
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
        answer = error.response.json()
        answer = answer.get("exception_message") or answer.get("detail") or answer
    except (ValueError, AttributeError):
        answer = error.response.text
    answer = one_line(answer)
    more = "…" if len(answer) > ANSWER_CHARACTERS else ""
    return f"{server} answered {asked.path} with status {status}: {answer[:ANSWER_CHARACTERS]}{more}"


def describe(error: BaseException) -> str:
    """Returns the error as one line."""
    text = one_line(error)
    known = hasattr(error, "exit_status")
    return text if known and text else f"{type(error).__name__}: {text}".rstrip(": ")
