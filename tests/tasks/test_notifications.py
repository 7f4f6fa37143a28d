"""Messages about flow runs, sent by a real Prefect server to a real receiver."""

import json
import os
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from uuid import UUID, uuid4

import pytest
import typer
from click.testing import Result
from prefect import flow, get_client, states
from prefect.automations import AutomationCore
from prefect.context import FlowRunContext
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL, temporary_settings
from pydantic import SecretStr
from typer.testing import CliRunner

from flows.cli.notify import notify
from flows.summary import Summary
from infra.errors import ServiceError, UsageError
from infra.machine.network import free_port
from infra.machine.stopping import Stopped
from infra.settings import Settings
from tasks.orchestration import messages, notifications
from tasks.orchestration.messages import Kind
from tasks.orchestration.notifications import (
    BLOCK,
    CRASHED,
    FAILED,
    NOT_BEGUN,
    PREFIX,
    PROMOTED,
    REFUSED,
    STALE,
    TEST,
    WAITING,
    ensure_notifications,
)
from tests.flows.program import wait_for

SECRET = f"secret-{uuid4().hex}"
LONG = timedelta(days=7)


class Receiver:
    """A chat; `answer` is the status of its answers, `says` their text, and `takes` the seconds until it answers."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.answer = 200
        self.says = "ok"
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
                self.send_header("Content-Length", str(len(owner.says)))
                self.end_headers()
                self.wfile.write(owner.says.encode())

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
    raise RuntimeError("no room")


def interrupted() -> UUID:
    """Runs a training's flow that a signal interrupts; returns the flow run's id."""
    ids = []

    def how() -> None:
        ids.append(UUID(flow_run.id))
        raise Stopped(signal.SIGTERM)

    with suppress(Stopped):
        ends("train", how)
    return ids[0]


def tells(kind: Kind, *, minor: bool = False) -> UUID:
    """Runs a training's flow that reports something with its own name; returns the flow run's id."""

    def how() -> None:
        messages.tell(kind, f"{kind} {flow_run.name}: it", minor=minor)

    return ends("train", how)


def fails(error: Exception, *, trial: bool = False) -> UUID:
    """Runs a training's flow that reports a failure as the pipeline does, and fails; returns the flow run's id."""

    def how() -> None:
        messages.tell_failure(error, trial=trial)
        raise error

    return ends("train", how)


ALL = [PROMOTED, REFUSED, WAITING, FAILED, TEST, CRASHED, NOT_BEGUN, STALE]


@pytest.mark.long
def test_each_kind_of_news_is_told_once_and_the_rest_is_not(chat: Receiver) -> None:
    assert ensure_notifications(chat.url, stale_after=LONG) == ALL
    refusal = "the quality gate refused: digits/3 75.42% against digits/2 99.17%; floor: below 80%"
    links = {"mlflow_run_url": "http://mlflow/#/run", "prefect_flow_run_url": "http://prefect/run"}
    version = {"model_name": "digits", "model_version": "3", **links}
    new = Summary(status="done", champion=True, accuracy=0.9958, gain=0.0042, reason="changed: data", **version)
    new = new.model_copy(update={"verdict": "passed: digits/3 99.58% against digits/2 99.17%"})
    worse = Summary(status="refused", champion=False, accuracy=0.7542, gain=-0.2375, error=refusal, **version)
    no_data = Summary(status="refused", error="the data gate refused 3 images", model_name="digits")
    for summary in (new, worse, no_data):
        assert summary.news
        messages.tell(summary.news, summary.message)
    messages.tell_waiting("digits", "4", "http://prefect/run/4", result="accuracy 99.60%")

    typed = fails(UsageError("no data set nosuch"))
    trial = fails(RuntimeError("no room"), trial=True)
    ended = interrupted()
    skipped = ends("retrain", lambda: states.Completed(name="Skipped", message="nothing changed"))
    completed = ends("retrain", lambda: states.Completed(message="digits/3 is champion"))
    refused = ends("retrain", lambda: states.Failed(name="Refused", message="worse than the champion"))
    other = ends("another-flow", lambda: states.Crashed(message="the machine went away"))
    minor = [tells("refused", minor=True), tells("registered"), tells("registered", minor=True)]
    unheard = (typed, trial, ended, skipped, completed, refused, other, *minor)

    failed = fails(RuntimeError('a "quoted" <!channel> & more\nof it'))
    crashed = ends("retrain", lambda: states.Crashed(message="its process was killed"))
    unbegun = ends("retrain", lambda: states.Failed(message="Validation of flow parameters failed"))
    last = tells("promoted")  # what would come twice, or too much, came before this one
    wait_for(lambda: chat.of(name_of(last)), "the last message", 30)
    expected = [
        f"promoted {name_of(last)}: it",
        "digits/3 was promoted to champion: accuracy 99.58%, +0.42 points against the champion\n"
        "why it ran: changed: data\n"
        "the quality gate passed: digits/3 99.58% against digits/2 99.17%\n"
        "report: http://mlflow/#/run/artifacts/report/index.html\nflow run: http://prefect/run",
        "digits/3 was refused: accuracy 75.42%, -23.75 points against the champion\n"
        f"{refusal}\nreport: http://mlflow/#/run/artifacts/report/index.html\nflow run: http://prefect/run",
        "digits was refused\nthe data gate refused 3 images",
        "digits/4 waits for approval: accuracy 99.60%\npromote or refuse: http://prefect/run/4",
        f'train {name_of(failed)} failed: RuntimeError: a "quoted" &lt;!channel&gt; &amp; more of it\n'
        f"flow run: {url_of(failed)}",
        f"retrain {name_of(crashed)}: Crashed: its process was killed\n{url_of(crashed)}",
        f"retrain {name_of(unbegun)}: Failed: Validation of flow parameters failed\n{url_of(unbegun)}",
    ]
    wait_for(lambda: len(chat.texts) >= len(expected), f"{len(expected)} messages; there are {chat.texts}", 30)
    assert sorted(chat.texts) == sorted(expected)
    assert not [run for run in unheard if any(name_of(run) in text for text in chat.texts)]


@pytest.mark.long
def test_the_rest_is_told_if_it_is_asked_for(chat: Receiver) -> None:
    ensure_notifications(chat.url, everything=True, stale_after=LONG)
    typed = fails(UsageError("no data set nosuch"))
    trial = fails(RuntimeError("no room"), trial=True)
    ended = interrupted()
    minor = [tells("refused", minor=True), tells("registered"), tells("registered", minor=True)]
    kinds = ("refused", "registered", "registered")
    expected = [
        f"train {name_of(typed)} failed: no data set nosuch\nflow run: {url_of(typed)}",
        f"train {name_of(trial)} failed: RuntimeError: no room\nflow run: {url_of(trial)}",
        *(f"{kind} {name_of(run)}: it" for kind, run in zip(kinds, minor, strict=True)),
    ]
    wait_for(lambda: len(chat.texts) >= len(expected) + 1, f"messages; there are {chat.texts}", 30)
    (last,) = chat.of(name_of(ended))
    assert last.startswith(f"train {name_of(ended)}: Crashed: Execution was interrupted")
    assert "ended by SIGTERM" in last
    assert sorted(chat.texts) == sorted([*expected, last])


@pytest.mark.long
def test_a_mistake_is_told_if_nobody_started_the_run(chat: Receiver) -> None:
    """A schedule or an event starts such a run; the flow run's record says so."""
    ensure_notifications(chat.url, stale_after=LONG)

    def scheduled() -> None:
        context = FlowRunContext.get()
        assert context and context.flow_run
        context.flow_run.auto_scheduled = True
        messages.tell_failure(UsageError("no data set nosuch"), trial=False)

    run = ends("retrain", scheduled)
    wait_for(lambda: chat.texts, "a message", 30)
    assert chat.texts == [f"retrain {name_of(run)} failed: no data set nosuch\nflow run: {url_of(run)}"]


def test_a_training_goes_on_if_prefect_takes_no_report(
    stack: object, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{free_port('127.0.0.1')}/api"}):
        messages.tell("promoted", "digits/3 was promoted")
    assert "no message is sent" in caplog.text


def test_automations_of_an_older_convoy_are_removed(chat: Receiver) -> None:
    ensure_notifications(chat.url, stale_after=LONG)
    old = automations()[REFUSED][1].model_copy(update={"name": f"{PREFIX}completed"})
    with get_client(sync_client=True) as client:
        client.create_automation(old)
    ensure_notifications(chat.url, stale_after=LONG)
    assert sorted(automations()) == sorted(ALL)


@pytest.mark.long
def test_doing_it_again_changes_nothing_and_another_address_is_taken(chat: Receiver) -> None:
    ensure_notifications(SecretStr("https://elsewhere.example/x"), stale_after=LONG)
    first = automations()
    ensure_notifications(chat.url, stale_after=LONG)
    assert automations() == first
    run = tells("promoted")
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

    def end(number: int) -> str:
        started.wait(30)
        return name_of(tells("promoted"))

    with ThreadPoolExecutor(together) as threads:
        names = list(threads.map(end, range(together)))
    wait_for(lambda: len(chat.texts) >= together, f"{together} messages; there are {chat.texts}", 30)
    assert [len(chat.of(name)) for name in names] == [1] * together


def run_notify(*arguments: str) -> Result:
    command = typer.Typer()
    command.command()(notify)
    return CliRunner().invoke(command, arguments)


@pytest.mark.long
def test_the_address_stays_secret_even_if_the_receiver_refuses(
    chat: Receiver, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat.answer = 404
    monkeypatch.setenv("CONVOY_NOTIFY_URL", chat.url.get_secret_value())
    done = run_notify("--stale-after", "3")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == ALL
    assert SECRET not in done.output
    assert SECRET not in run_notify("--help").output
    run = tells("promoted")
    wait_for(lambda: chat.of(name_of(run)), "a message", 30)

    with get_client(sync_client=True) as client:
        block = client.read_block_document_by_name(BLOCK, "webhook", include_secrets=False)
    assert SECRET not in block.model_dump_json()
    wait_for(lambda: 404 in statuses(settings), "what the receiver answered", 30)
    assert SECRET not in (settings.logs / "prefect.log").read_text()
    assert not [line for line in stored(settings) if SECRET in line]
    assert len(chat.of(name_of(run))) == 1

    monkeypatch.delenv("CONVOY_NOTIFY_URL")
    assert sorted(run_notify("--off").stdout.strip().removeprefix("removed ").split(", ")) == sorted(ALL)
    assert automations() == {}
    assert run_notify("--off").stdout == "There were no notifications.\n"


@pytest.mark.long
def test_a_test_message_reports_what_the_receiver_answered(chat: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONVOY_NOTIFY_URL", raising=False)
    with pytest.raises(UsageError, match="there are no notifications yet"):
        notify(test=True)

    done = run_notify("--url", chat.url.get_secret_value(), "--stale-after", "3", "--test")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [*ALL, "test message sent; the receiver answered 200: ok"]
    assert chat.texts == [f"Convoy sends its messages here from {socket.gethostname()}: this is a test"]
    before = automations()
    assert run_notify("--test").stdout == "test message sent; the receiver answered 200: ok\n"
    monkeypatch.setenv("CONVOY_NOTIFY_URL", chat.url.get_secret_value())
    assert run_notify("--test").stdout == "test message sent; the receiver answered 200: ok\n"
    monkeypatch.delenv("CONVOY_NOTIFY_URL")
    assert automations() == before  # the time of --stale-after included
    assert len(chat.texts) == 3

    chat.answer, chat.says = 404, f"Cannot POST /{SECRET}\n<b>nothing</b> here"
    with pytest.raises(ServiceError) as refused:
        notify(test=True)
    assert str(refused.value) == "the receiver answered 404: Cannot POST … <b>nothing</b> here"
    assert len(chat.texts) == 4

    chat.close()
    with pytest.raises(ServiceError, match=r"the test message did not arrive: .*ConnectError") as lost:
        notify(test=True)
    assert SECRET not in str(lost.value)


def test_notify_wants_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONVOY_NOTIFY_URL", raising=False)
    with pytest.raises(UsageError, match="CONVOY_NOTIFY_URL"):
        notify()


@pytest.mark.parametrize(
    ("address", "days"),
    [
        *((address, 7.0) for address in ("ftp://host/secret", "secret", "https:///secret", "https://host:x/secret")),
        *(("https://host/secret", days) for days in (0.0001, -1.0, float("nan"), 1e300)),
    ],
)
def test_what_cannot_be_used_is_refused_without_repeating_it(
    address: str, days: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a server starts: there is none here."""
    monkeypatch.setattr("flows.cli.notify.servers_up", lambda **_: pytest.fail("a server was started"))
    with pytest.raises(UsageError) as refused:
        notify(url=address, stale_after=days)
    assert "secret" not in str(refused.value)


def test_off_and_test_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="exclude"):
        notify(off=True, test=True)
