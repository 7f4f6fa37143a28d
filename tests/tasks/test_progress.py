"""Progress where there is no terminal, and in Prefect."""

import logging
import threading

import pytest
from prefect import flow, get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

from tasks import progress as module
from tasks.progress import progress


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "convoy"]


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="convoy")


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
    monkeypatch.setattr(module, "LOG_EVERY", 0.0)
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


def test_what_looks_like_markup_in_a_name_is_shown_as_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress("Listing [red]:cat:[/x]", 1, unit="files") as advance:
        advance(1, note="[/y] left")
    shown = capsys.readouterr().err
    assert "Listing [red]:cat:[/x]" in shown
    assert "[/y] left" in shown


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
    assert (artifact.type, artifact.data, artifact.description) == ("progress", 100.0, "Working")
