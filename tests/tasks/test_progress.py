"""Progress without a terminal, and in Prefect."""

import logging
import re
import socket
import sys
import threading

import pytest
from prefect import flow, get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.context import SyncClientContext
from prefect.settings import PREFECT_API_URL, temporary_settings

from tasks.orchestration import cancellation
from tasks.orchestration import progress as module
from tasks.orchestration.cancellation import CancelWatch
from tasks.orchestration.progress import progress


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "convoy"]


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="convoy")


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, as its only element, which tests set."""
    time = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: time[0])
    return time


def test_without_a_terminal_the_beginning_and_the_end_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with progress("Reading digits", 1797, unit="images") as advance:
        assert lines(caplog) == ["Reading digits …"]
        advance(1000)
        advance(797, "all well")
    last = lines(caplog)[-1]
    assert last.startswith("Reading digits: 100%, ")
    assert "images/s" in last
    assert last.endswith("all well")


def test_long_work_is_logged_now_and_then(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOG_SECONDS", 0.0)
    with progress("Packing", 4, unit="files") as advance:
        for _ in range(4):
            advance(1)
    assert [line.split(",")[0] for line in lines(caplog)[1:-1]] == [f"Packing: {n}%" for n in (25, 50, 75, 100)]


def test_work_of_unknown_length_has_no_share(caplog: pytest.LogCaptureFixture) -> None:
    with progress("Downloading", None, unit="bytes") as advance:
        advance(10**6)
    assert "%" not in lines(caplog)[-1]
    assert "B/s" in lines(caplog)[-1]


def test_work_that_fails_is_not_said_to_be_done(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError), progress("Reading", 2, unit="images") as advance:
        advance(1)
        raise ValueError
    assert lines(caplog) == ["Reading …"]


def test_threads_advance_together(caplog: pytest.LogCaptureFixture) -> None:
    with progress("Storing", 4000, unit="files") as advance:

        def advance_often() -> None:
            for _ in range(1000):
                advance(1)

        threads = [threading.Thread(target=advance_often) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert lines(caplog)[-1].startswith("Storing: 100%")


def test_nothing_to_do_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    with progress("Downloading", 0, unit="bytes"):
        pass
    assert lines(caplog)[-1].startswith("Downloading: ")


def test_a_terminal_gets_a_bar(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress("Training", 2.0, unit="epochs") as advance:
        advance(2.0, "loss 0.1")
    assert lines(caplog) == []
    assert "loss 0.1" in capsys.readouterr().err


@pytest.mark.parametrize("columns", [30, 60, 80, 110, 120, 200])
def test_a_terminal_of_any_width_gets_one_line_without_colours_if_they_are_not_wanted(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    for name, value in {"COLUMNS": str(columns), "NO_COLOR": "1", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    with progress("Training on 2 ranks", 20.0, unit="epochs", artifact=None) as advance:
        advance(20.0, "epoch 20/20 · loss 0.123 · 12,345 images/s · val 97.00%")
    (*_, shown) = filter(None, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "\n", capsys.readouterr().err).split("\n"))
    assert len(shown.rstrip()) <= columns
    assert ("…" in shown) == (columns < 60)  # so nothing is lost in a terminal of 60 columns
    if columns == 60:
        assert shown.rstrip() == "100%, in 0 s, 20/20 · loss 0.123 · 12,345/s · val 97.00%"
    if columns == 80:
        assert shown.startswith("Training  100%, in 0 s, epoch 20/20 · loss 0.123 · 12,345 images/s · val 97.00%")
    if columns >= 110:
        whole = "Training on 2 ranks  100%, in 0 s, epoch 20/20 · loss 0.123 · 12,345 images/s · val 97.00%"
        assert shown.rstrip().endswith(whole)
    assert ("━" in shown) == (columns >= 120)


def test_what_is_logged_beside_a_bar_is_not_broken_over_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"http://127.0.0.1:5000/#/experiments/1/runs/{'0' * 32}/artifacts/report/index.html"
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    with progress("Training", 2.0, unit="epochs"):
        print(f"the report is {address}", file=sys.stderr)
    assert f"the report is {address}\n" in capsys.readouterr().err


def test_what_is_waited_for_is_shown_and_no_part_of_the_time_to_go(
    caplog: pytest.LogCaptureFixture, now: list[float]
) -> None:
    """Ranks that take 50 s to start and go on from the half, at 1 s per epoch, and start again after a crash."""
    with progress("Training", 100.0, unit="epochs") as advance:
        advance(0.0, waiting="starting the ranks")
        now[0] = 40.0
        advance(0.0, waiting="starting the ranks")
        now[0] = 50.0
        advance(50.0, waiting="going on after step 400")
        for now[0] in (60.0, 70.0):
            advance(10.0, "loss 0.1")
        now[0] = 90.0
        advance(-10.0, waiting="starting the ranks")
        now[0] = 100.0
        advance(10.0, "loss 0.2")
    assert lines(caplog)[1:] == [
        "Training: starting the ranks, 40 s",
        "Training: 50%, going on after step 400",
        "Training: 60%, 40 s to go, loss 0.1",
        "Training: 70%, 30 s to go, loss 0.1",
        "Training: 60%, starting the ranks",
        "Training: 70%, 30 s to go, loss 0.2",
        "Training: 70%, in 2 min, loss 0.2",
    ]


def test_time_to_go_counts_from_the_first_news(caplog: pytest.LogCaptureFixture, now: list[float]) -> None:
    """Ranks that take 50 s to start, and 1 s per epoch."""
    with progress("Training", 100.0, unit="epochs") as advance:
        for done, now[0] in ((0.0, 50.0), (10.0, 60.0)):
            advance(done, f"epoch {done:.0f}/100")
    assert lines(caplog)[1:3] == ["Training: 0%, epoch 0/100", "Training: 10%, 90 s to go, epoch 10/100"]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(-1, "0 s"), (99, "99 s"), (100, "2 min"), (5900, "98 min"), (7260, "2 h 1 min"), (200_000, "2 days")],
)
def test_durations_are_as_short_as_they_can_be(seconds: float, said: str) -> None:
    assert module.duration(seconds) == said


def test_what_looks_like_markup_in_a_name_is_shown_as_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress("Listing [red]:cat:[/x]", 1, unit="files") as advance:
        advance(1, note="[/y] left")
    shown = capsys.readouterr().err
    assert "Listing [red]:cat:[/x]" in shown
    assert "[/y] left" in shown


def test_work_does_not_wait_for_a_prefect_that_never_answers(stack: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LAST_REQUEST_SECONDS", 0.1)
    monkeypatch.setattr(module, "ARTIFACT_SECONDS", 0.0)
    monkeypatch.setattr(cancellation, "POLL_SECONDS", 0.0)

    @flow
    def working() -> str:
        with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{port}/api"}), SyncClientContext():
            cancelled = CancelWatch()
            with progress("Working", 8, unit="files", artifact="unanswered") as advance:
                for _ in range(8):
                    advance(1)
                    assert not cancelled()
            for _ in range(2):
                silent.accept()  # of the artifact, and of the watch
        return "done"

    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        port = silent.getsockname()[1]
        assert working() == "done"


def test_a_flow_run_gets_an_artifact_that_ends_at_100_percent(stack: object) -> None:
    @flow
    def work() -> None:
        with progress("Working", 8, unit="files", artifact="working-test") as advance:
            for _ in range(8):
                advance(1)

    work()
    with get_client(sync_client=True) as client:
        (artifact,) = client.read_artifacts(
            artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["working-test"]))
        )
    assert (artifact.type, artifact.data) == ("progress", 100.0)
    assert re.fullmatch(r"Working: 100%, .* files/s, in \d+ s", artifact.description or "")
