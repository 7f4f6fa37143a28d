"""Printing any text to any reader, and errors of other libraries as one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from rich.table import Table

from flows.cli.console import as_known_error, describe, print_line, print_pairs, terminal
from flows.summary import Summary, write_summary
from infra.errors import Outage, ServiceError, UsageError
from infra.machine.files import atomic_file, check_writable
from tests.conftest import REPOSITORY

ODD = "[red]cat 5, [blue]:dog: 3 [/x] [link=http://x]y[/]"
TALKATIVE = """
import logging, sys
from pathlib import Path
from flows.cli.console import print_line
from infra.machine.output import outlive_readers
from tasks.orchestration.progress import progress, show_task_logs
show_task_logs()
task = sys.modules["tasks.orchestration.progress"].__file__
with outlive_readers("stderr"):
    with outlive_readers("stdout"):
        for number in range(50):
            print_line("x" * 10_000)
            print_line("naïve 花 \\udcff", error=True)
            record = logging.LogRecord("x", logging.INFO, task, 1, "花", (), None)
            logging.getLogger("prefect.flow_runs").handle(record)
            print("y" * 10_000)
        with progress("Counting", 3, unit="files") as advance:
            advance(3)
    Path(sys.argv[1]).write_text("done")
"""
DEAD_API = """
from prefect import flow
from flows.cli.console import as_known_error, describe
@flow
def nothing(): pass
try:
    nothing()
except Exception as error:
    print(describe(as_known_error(error)))
"""


def test_texts_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    print_pairs({"classes": ODD, "table": "x[/y].csv"})
    print_line(ODD)
    table = Table("[b]", "b", box=None)
    table.add_row(ODD, "x[/y].csv")
    terminal(width=200).print(table)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [f"classes  {ODD}", "table    x[/y].csv", ODD]
    assert lines[3].split() == ["[b]", "b"]
    assert lines[4].split("  ") == [f" {ODD}", "x[/y].csv "]


@pytest.mark.long
@pytest.mark.parametrize("output", ["closed pipe", "full disk", "ascii"])
def test_work_goes_on_when_its_output_cannot_be_written(tmp_path: Path, output: str) -> None:
    environment = os.environ | ({"PYTHONIOENCODING": "ascii"} if output == "ascii" else {})
    command = [sys.executable, "-c", TALKATIVE, str(tmp_path / "result")]
    if output == "closed pipe":
        reading, writing = os.pipe()
        os.close(reading)
    else:
        writing = os.open("/dev/full" if output == "full disk" else tmp_path / "output", os.O_WRONLY | os.O_CREAT)
    try:
        done = subprocess.run(command, stdout=writing, stderr=writing, env=environment, cwd=REPOSITORY, timeout=60)
    finally:
        os.close(writing)
    assert done.returncode == 0
    assert (tmp_path / "result").read_text() == "done"


def answer(status: int, **content: object) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "http://me:secret@prefect.example:4200/api/flow_runs/")
    try:
        httpx.Response(status, request=request, json=content).raise_for_status()
    except httpx.HTTPStatusError as error:
        return error
    raise AssertionError


@pytest.mark.parametrize(
    "error, kind, hint",
    [
        (answer(403), ServiceError, "check PREFECT_API_AUTH_STRING"),
        (answer(422, exception_message="less than 524,288 bytes " + "x" * 10**6), ServiceError, "less than 524,288 by"),
        (answer(500, detail="oh"), ServiceError, "/api/flow_runs/ with status 500: oh"),
        (httpx.ReadTimeout(""), Outage, "does not answer (ReadTimeout)"),
        (ExceptionGroup("many", [ValueError(), httpx.ConnectError("refused")]), Outage, "does not answer"),
        (
            OSError(28, "No space left on device", "/data/cache/x"),
            ServiceError,
            "no space left on the disk for /data/c",
        ),
        (RuntimeError("I/O error: No space left on device (os error 28)"), ServiceError, "no space left on the disk"),
        (
            RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 480"),
            ServiceError,
            "no space left on the disk",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_that_are_nobodys_bug_are_one_line(error: Exception, kind: type[Exception], hint: str) -> None:
    outer = RuntimeError("the flow failed")
    outer.__cause__ = error
    for each in (error, outer):
        found = as_known_error(each)
        assert type(found) is kind
        assert hint in describe(found)
        assert len(describe(found)) < 500
        assert "secret" not in describe(found)


def test_a_summary_is_written_to_a_pipe_or_link_and_does_not_replace_it(tmp_path: Path) -> None:
    target, link, pipe = tmp_path / "file", tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(target)
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for each in (link, pipe):
        check_writable(each, "--summary", replaced=False)
        write_summary(each, Summary(status="failed", dataset="digits"))
    received = os.read(reader, 10_000)
    os.close(reader)
    assert link.is_symlink() and pipe.is_fifo()
    assert json.loads(target.read_bytes()) == json.loads(received)


def test_a_file_that_is_replaced_may_be_a_link_but_no_device_or_pipe(tmp_path: Path) -> None:
    target, link, pipe = tmp_path / "file", tmp_path / "link", tmp_path / "pipe"
    target.write_text("old")
    link.symlink_to(target)
    os.mkfifo(pipe)
    check_writable(link, "--out")
    with atomic_file(link) as file:
        file.write_text("new")
    assert (link.is_symlink(), target.read_text()) == (True, "new")
    for each in (pipe, Path(os.devnull), tmp_path, tmp_path / "none" / "file", tmp_path / (300 * "x") / "file"):
        with pytest.raises(UsageError, match=r"^--out .*: cannot write there; name a file in a folder that exists$"):
            check_writable(each, "--out")


def test_a_public_file_keeps_the_mode_of_the_one_that_it_replaces(tmp_path: Path) -> None:
    def mode(name: str, public: bool) -> int:
        with atomic_file(tmp_path / name, public=public) as file:
            file.write_text("new")
        return (tmp_path / name).stat().st_mode & 0o777

    (tmp_path / "any").touch()
    assert mode("new", True) == (tmp_path / "any").stat().st_mode & 0o777
    (tmp_path / "new").chmod(0o664)
    assert mode("new", True) == 0o664
    assert mode("secret", False) == 0o600


@pytest.mark.long
@pytest.mark.parametrize(
    "file, content, reason",
    [
        ("prefect.toml", "this is [ not", "prefect.toml: invalid TOML"),
        (".env", "PREFECT_LOGGING_LEVEL=LOUD\n", "LoggingSettings, level: Input should be"),
        ("pyproject.toml", '[tool.prefect]\nlogging.level = "LOUD"\n', "LoggingSettings, level: Input should be"),
    ],
)
def test_settings_of_prefects_in_the_working_folder_that_are_wrong_are_one_line(
    tmp_path: Path, file: str, content: str, reason: str
) -> None:
    (tmp_path / file).write_text(content)
    code = (
        "from flows.cli.console import as_known_error, describe\n"
        "try: import prefect.context\n"
        "except Exception as error: print(describe(as_known_error(error)))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.count("\n") == 1
    assert done.stdout.startswith("Prefect cannot use its settings (") and reason in done.stdout
    assert ".env, prefect.toml and pyproject.toml" in done.stdout


def test_a_bug_stays_a_bug() -> None:
    error = ValueError("no")
    assert as_known_error(error) is error
    known = UsageError("no")
    known.__cause__ = httpx.ConnectError("refused")
    assert as_known_error(known) is known


@pytest.mark.long
def test_a_prefect_that_is_gone_just_before_the_flow_begins_is_one_line(tmp_path: Path) -> None:
    own = {"PREFECT_API_URL": "http://127.0.0.1:9/api", "PREFECT_HOME": str(tmp_path)}
    command = [sys.executable, "-c", DEAD_API]
    done = subprocess.run(command, env=os.environ | own, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("Prefect at http://127.0.0.1:9/api does not answer"), json.dumps(done.stderr)
    assert len(done.stdout.splitlines()) == 1
