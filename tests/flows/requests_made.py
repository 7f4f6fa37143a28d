"""Counts the requests that this process makes to the servers, by server and by the step that makes them."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import requests
from botocore.httpsession import URLLib3Session
from prefect.context import TaskRunContext

SENDERS = {
    "MLflow": [(requests.Session, "send")],
    "Prefect": [(httpx.Client, "send"), (httpx.AsyncClient, "send")],
    "bucket": [(URLLib3Session, "send")],
}


@contextmanager
def counting() -> Iterator[Counter[tuple[str, str]]]:
    """Yields a counter of (server, step), which fills up while the block runs."""
    found: Counter[tuple[str, str]] = Counter()

    def counted(server: str, send: Any) -> Any:
        def count(*arguments: Any, **options: Any) -> Any:
            context = TaskRunContext.get()
            found[server, context.task.name if context else "flow"] += 1
            return send(*arguments, **options)

        return count

    with pytest.MonkeyPatch.context() as patch:
        for server, methods in SENDERS.items():
            for kind, name in methods:
                patch.setattr(kind, name, counted(server, getattr(kind, name)))
        yield found


def table(found: Counter[tuple[str, str]]) -> str:
    """Returns the counts as text, one line per step."""
    steps = sorted({step for _, step in found})
    lines = [f"{'step':22}" + "".join(f"{server:>10}" for server in SENDERS)]
    for step in (*steps, "all"):
        counts = [sum(n for (s, t), n in found.items() if s == server and step in (t, "all")) for server in SENDERS]
        lines.append(f"{step:22}" + "".join(f"{count:10}" for count in counts))
    return "\n".join(lines)
