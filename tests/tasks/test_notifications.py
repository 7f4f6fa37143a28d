"""Messages about flow runs, sent by a real Prefect server to a real receiver."""

import json
import os
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from uuid import UUID, uuid4

import pytest
import typer
from prefect import flow, get_client, states
from prefect.automations import AutomationCore
from pydantic import SecretStr
from typer.testing import CliRunner

from flows.cli.notify import notify
from infra.errors import UsageError
from infra.settings import Settings
from tasks.orchestration import notifications
from tasks.orchestration.notifications import BLOCK, COMPLETED, FAILED, PREFIX, REFUSED, STALE, ensure_notifications
from tests.flows.program import wait_for

SECRET = f"secret-{uuid4().hex}"
LONG = timedelta(days=7)


class Receiver:
    """A chat; `answer` is the status of its answers, and `takes` the seconds until it answers."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.answer = 200
        self.takes = 0.0
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.headers["Content-Type"] == "application/json"
                assert self.path == f"/{SECRET}"
                owner.texts.append(json.loads(body)["text"])
                time.sleep(owner.takes)
                self.send_response(owner.answer)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = SecretStr(f"http://127.0.0.1:{self._server.server_port}/{SECRET}")
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def of(self, name: str) -> list[str]:
        """Returns the messages about a flow run."""
        return [text for text in self.texts if f" {name}: " in text]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def chat(stack: object) -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    notifications.remove_notifications()
    receiver.close()


def ends(flow_name: str, how: Callable[[], object]) -> UUID:
    """Runs a flow with these names of flow and run; returns the run's id."""

    @flow(name=flow_name, flow_run_name=f"run-{uuid4().hex}", persist_result=False)
    def small() -> object:
        return how()

    return small(return_state=True).state_details.flow_run_id  # type: ignore[return-value]


def stored(settings: Settings, query: str = "") -> list[str]:
    """Reads the database of Prefect's server: the result of a query, or everything as SQL."""
    file = settings.home / "prefect" / "prefect.db"
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as database:
        return [row for (row,) in database.execute(query)] if query else list(database.iterdump())


def statuses(settings: Settings) -> list[int]:
    """Returns the receivers' answers that Prefect has recorded."""
    query = "SELECT payload FROM events WHERE event = 'prefect.automation.action.executed'"
    return [json.loads(payload)["status_code"] for payload in stored(settings, query)]


def name_of(flow_run: UUID) -> str:
    with get_client(sync_client=True) as client:
        return client.read_flow_run(flow_run).name


def url_of(flow_run: UUID) -> str:
    return f"{os.environ['PREFECT_API_URL'].removesuffix('/api')}/runs/flow-run/{flow_run}"


def automations() -> dict[str, tuple[UUID, AutomationCore]]:
    with get_client(sync_client=True) as client:
        ours = [each for each in client.read_automations() if each.name.startswith(PREFIX)]
    return {each.name: (each.id, AutomationCore.model_validate(each.model_dump(exclude={"id"}))) for each in ours}


def fail() -> None:
    raise RuntimeError('a "quoted" <!channel> & more\nof it')


def test_each_end_is_told_once_and_nothing_to_do_is_not_told(chat: Receiver) -> None:
    assert ensure_notifications(chat.url, stale_after=LONG) == [COMPLETED, REFUSED, FAILED, STALE]
    skipped = ends("retrain", lambda: states.Completed(name="Skipped", message="nothing changed"))
    other = ends("another-flow", lambda: None)
    promoted = ends("retrain", lambda: states.Completed(message="digits/3 is champion"))
    plain = ends("train", lambda: None)
    refused = ends("retrain", lambda: states.Completed(name="Refused", message="worse than the champion"))
    failed = ends("train", fail)
    crashed = ends("retrain", lambda: states.Crashed(message="the machine went away"))

    told = (promoted, plain, refused, failed, crashed)
    wait_for(lambda: len(chat.texts) >= len(told), f"{len(told)} messages; there are {chat.texts}", 30)
    last = ends("train", lambda: None)  # what would come twice, or too much, came before this one
    wait_for(lambda: chat.of(name_of(last)), "the last message", 30)

    count = Counter({run: len(chat.of(name_of(run))) for run in (*told, last, skipped, other)})
    assert count == {**dict.fromkeys((*told, last), 1), skipped: 0, other: 0}
    assert len(chat.texts) == len(told) + 1
    said = {run: chat.of(name_of(run))[0] for run in told}
    assert said[promoted] == f"retrain {name_of(promoted)}: Completed: digits/3 is champion\n{url_of(promoted)}"
    assert said[plain] == f"train {name_of(plain)}: Completed\n{url_of(plain)}"
    assert said[refused] == f"retrain {name_of(refused)}: Refused: worse than the champion\n{url_of(refused)}"
    assert said[crashed] == f"retrain {name_of(crashed)}: Crashed: the machine went away\n{url_of(crashed)}"
    assert said[failed].startswith(f"train {name_of(failed)}: Failed: ")
    assert 'RuntimeError: a "quoted" &lt;!channel&gt; &amp; more\nof it' in said[failed]
    assert said[failed].endswith(f"\n{url_of(failed)}")


def test_doing_it_again_changes_nothing_and_another_address_is_taken(chat: Receiver) -> None:
    ensure_notifications(SecretStr("https://elsewhere.example/x"), stale_after=LONG)
    first = automations()
    ensure_notifications(chat.url, stale_after=LONG)
    assert automations() == first
    run = ends("train", lambda: None)
    wait_for(lambda: chat.of(name_of(run)), "a message at the new address", 30)

    ensure_notifications(chat.url, stale_after=2 * LONG)
    second = automations()
    assert {name for name, each in second.items() if each != first[name]} == {STALE}
    assert second[STALE][0] == first[STALE][0]
    assert second[STALE][1].trigger.within == 2 * LONG  # type: ignore[union-attr]

    assert sorted(notifications.remove_notifications()) == sorted(first)
    assert automations() == {}
    assert notifications.remove_notifications() == []


@pytest.mark.slow
def test_a_flow_that_has_not_completed_for_long_is_told(chat: Receiver) -> None:
    flow_name, span = f"retrain-{uuid4().hex[:8]}", timedelta(seconds=12)
    ensure_notifications(chat.url, flows=["none"], stale_after=span, stale_flow=flow_name)
    started = time.monotonic()
    while time.monotonic() - started < span.total_seconds() + 4:  # each keeps the silence short
        run = ends(flow_name, lambda: states.Completed(name="Skipped"))
        time.sleep(1)
    assert chat.texts == []
    failed = ends(flow_name, fail)
    wait_for(lambda: chat.texts, "a warning", span.total_seconds() + 30)
    assert name_of(failed) not in chat.texts[0]
    assert chat.texts == [
        f"{flow_name} has not completed for 12 seconds; the last run that did: {name_of(run)}\n{url_of(run)}"
    ]


@pytest.mark.slow
def test_a_flow_that_has_never_completed_is_told_too(chat: Receiver) -> None:
    flow_name = f"retrain-{uuid4().hex[:8]}"
    ensure_notifications(chat.url, flows=["none"], stale_after=timedelta(seconds=10), stale_flow=flow_name)
    wait_for(lambda: chat.texts, "a warning", 40)
    assert chat.texts == [f"{flow_name} has not completed for 10 seconds"]


@pytest.mark.slow
def test_runs_that_end_at_the_same_moment_are_each_told_once(chat: Receiver) -> None:
    ensure_notifications(chat.url, stale_after=LONG)
    chat.takes = 0.2
    together = 8
    started = threading.Barrier(together)

    @flow(name="train", flow_run_name=f"together-{uuid4().hex}", persist_result=False)
    def small() -> None:
        """A flow whose runs are ended by hand."""

    def end(number: int) -> str:
        with get_client(sync_client=True) as client:
            run = client.create_flow_run(small, name=f"run-{number}-{uuid4().hex}")
            started.wait(30)
            client.set_flow_run_state(run.id, states.Completed(), force=True)
        return run.name

    with ThreadPoolExecutor(together) as threads:
        names = list(threads.map(end, range(together)))
    wait_for(lambda: len(chat.texts) >= together, f"{together} messages; there are {chat.texts}", 30)
    assert [len(chat.of(name)) for name in names] == [1] * together


def test_the_address_stays_secret_even_if_the_receiver_refuses(
    chat: Receiver, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = typer.Typer()
    command.command()(notify)
    chat.answer = 404
    monkeypatch.setenv("CONVOY_NOTIFY_URL", chat.url.get_secret_value())
    done = CliRunner().invoke(command, ["--stale-after", "3"])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [COMPLETED, REFUSED, FAILED, STALE]
    assert SECRET not in done.output
    assert SECRET not in CliRunner().invoke(command, ["--help"]).output
    run = ends("train", lambda: None)
    wait_for(lambda: chat.of(name_of(run)), "a message", 30)

    with get_client(sync_client=True) as client:
        block = client.read_block_document_by_name(BLOCK, "webhook", include_secrets=False)
    assert SECRET not in block.model_dump_json()
    wait_for(lambda: 404 in statuses(settings), "what the receiver answered", 30)
    assert SECRET not in (settings.logs / "prefect.log").read_text()
    assert not [line for line in stored(settings) if SECRET in line]
    assert len(chat.of(name_of(run))) == 1

    monkeypatch.delenv("CONVOY_NOTIFY_URL")
    done = CliRunner().invoke(command, ["--off"])
    assert done.stdout == f"removed {', '.join((COMPLETED, REFUSED, FAILED, STALE))}\n"
    assert automations() == {}
    assert CliRunner().invoke(command, ["--off"]).stdout == "There were no notifications.\n"


def test_notify_wants_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONVOY_NOTIFY_URL", raising=False)
    with pytest.raises(UsageError, match="CONVOY_NOTIFY_URL"):
        notify()


@pytest.mark.parametrize(
    ("address", "span"), [("ftp://host/secret", LONG), ("secret", LONG), ("https://host/secret", timedelta(seconds=9))]
)
def test_what_cannot_be_used_is_refused_without_repeating_it(address: str, span: timedelta) -> None:
    with pytest.raises(UsageError) as refused:
        ensure_notifications(SecretStr(address), stale_after=span)
    assert "secret" not in str(refused.value)
