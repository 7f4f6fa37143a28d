"""Server processes are found without their parent or record, and no other process is stopped."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from infra.machine.lifeline import is_alive
from infra.stack import processes
from infra.stack.processes import Server, StartRecord
from infra.web_settings import SAVED_VARIABLES
from tests.infra.localstack import until

PARENT_AND_CHILD = (
    "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
    "print('started', flush=True); time.sleep(600)"
)
DEAF = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('started', flush=True); time.sleep(600)"
)
WITHOUT_ITS_FIRST_THREAD = (
    "import ctypes, signal, threading, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "threading.Thread(target=time.sleep, args=(600,)).start(); "
    "print('started', flush=True); ctypes.CDLL(None).pthread_exit(None)"
)


class Started:
    """A server made of a few lines of Python."""

    def __init__(self, folder: Path, program: str, *, asks_the_web: bool = False) -> None:
        self.mark = f"test@{folder}"
        self.record_file = folder / "record.json"
        self.server = Server(
            command=(sys.executable, "-c", program),
            environment={"A_SECRET": "tell nobody"},
            not_inherited=("UNWANTED_",),
            asks_the_web=asks_the_web,
            folder=folder / "data",
            log=folder / "server.log",
            ports=(),
        )
        self.process = processes.start(self.server, self.mark, self.record_file)
        until(lambda: "started" in self.server.log.read_text())

    @property
    def record(self) -> StartRecord:
        found = StartRecord.from_file(self.record_file)
        assert found
        return found

    def members(self) -> set[psutil.Process]:
        return processes.members(self.mark, StartRecord.from_file(self.record_file))

    def stop(self) -> None:
        processes.stop(self.members)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Started]]:
    started: list[Started] = []

    def start_one(program: str) -> Started:
        started.append(Started(tmp_path, program))
        return started[-1]

    yield start_one
    for one in started:
        one.stop()


@pytest.fixture
def stranger() -> Iterator[psutil.Process]:
    """A process that belongs to no server."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        yield psutil.Process(process.pid)
        process.kill()


def test_a_server_has_a_session_of_its_own_and_no_standard_input(start: Callable[[str], Started]) -> None:
    program = "import os, sys; print(os.getsid(0) == os.getpid(), repr(sys.stdin.read()), 'started', flush=True)"
    server = start(program + "; import time; time.sleep(600)")
    assert server.server.log.read_text().startswith("True ''")


def test_a_server_inherits_nothing_that_it_must_not(
    start: Callable[[str], Started], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNWANTED_SETTING", "1")
    monkeypatch.setenv("WANTED_SETTING", "1")
    monkeypatch.setenv("no_proxy", "intranet.example")
    variables = psutil.Process(start(PARENT_AND_CHILD).process.pid).environ()
    assert "UNWANTED_SETTING" not in variables
    assert variables["WANTED_SETTING"] == "1"
    assert variables["no_proxy"] == "127.0.0.1,localhost"


def test_only_a_server_that_asks_the_web_inherits_the_users_proxies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(SAVED_VARIABLES, raising=False)
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    monkeypatch.setenv("no_proxy", "intranet.example")
    for asks, proxy, without in (
        (False, None, "127.0.0.1,localhost"),
        (True, "http://proxy.example:3128", "intranet.example,127.0.0.1,localhost"),
    ):
        server = Started(tmp_path, PARENT_AND_CHILD, asks_the_web=asks)
        variables = psutil.Process(server.process.pid).environ()
        server.stop()
        assert (variables.get("HTTPS_PROXY"), variables["no_proxy"]) == (proxy, without)


def test_stop_ends_a_server_with_its_children(start: Callable[[str], Started]) -> None:
    server = start(PARENT_AND_CHILD)
    found = server.members()
    assert len(found) == 2
    server.stop()
    assert not any(is_alive(process) for process in found)


def test_children_of_a_killed_server_are_found_and_stopped(start: Callable[[str], Started]) -> None:
    server = start(PARENT_AND_CHILD)
    (child,) = psutil.Process(server.process.pid).children()
    server.process.kill()
    server.process.wait()
    assert server.record.process(server.mark) is None
    assert server.members() == {child}
    server.stop()
    assert server.members() == set()


def test_a_server_without_a_record_is_found(start: Callable[[str], Started]) -> None:
    server = start(PARENT_AND_CHILD)
    server.record_file.unlink()
    assert len(server.members()) == 2


def test_a_server_that_ignores_the_first_signal_is_killed(
    start: Callable[[str], Started], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "TERM_SECONDS", 0.2)
    server = start(DEAF)
    server.stop()
    assert not psutil.pid_exists(server.process.pid)


def test_a_server_of_which_only_some_threads_have_ended_still_counts_and_is_waited_for(
    start: Callable[[str], Started], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "TERM_SECONDS", 0.2)
    server = start(WITHOUT_ITS_FIRST_THREAD)
    process = psutil.Process(server.process.pid)
    until(lambda: process.status() == psutil.STATUS_ZOMBIE)
    assert server.members() == {process}
    server.stop()
    assert not is_alive(process)


def test_a_process_id_in_use_by_another_process_is_left_alone(
    start: Callable[[str], Started], stranger: psutil.Process
) -> None:
    server = start(PARENT_AND_CHILD)
    stale = server.record.model_copy(update={"pid": stranger.pid, "created": stranger.create_time() - 3600})
    server.record_file.write_text(stale.model_dump_json())
    assert server.record.process(server.mark) is None
    assert stranger not in server.members()
    server.stop()
    assert is_alive(stranger)


def test_a_record_that_cannot_be_read_counts_as_none(tmp_path: Path) -> None:
    half = tmp_path / "record.json"
    half.write_text('{"pid": 12, "crea')
    assert StartRecord.from_file(half) is None


def test_the_log_of_the_start_before_is_kept(start: Callable[[str], Started]) -> None:
    start("print('started first', flush=True)")
    second = start("print('started second', flush=True)")
    assert second.server.log.read_text() == "started second\n"
    assert second.server.log.with_suffix(".log.1").read_text() == "started first\n"


def test_the_end_of_a_log_is_one_short_line(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text("x" * 50_000 + "\nfirst\n\n   second\t line\nlast\n")
    assert processes.log_end(log) == "first | second line | last"
    assert processes.log_end(tmp_path / "absent.log") == "(no log)"


def test_the_end_of_a_crashed_go_programs_log_is_the_reason(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text("ready\nF1124 06:37:47 mini.go:12] the disk is full\n\ngoroutine 1 [running]:\nmain.main()\n")
    assert processes.log_end(log) == "F1124 06:37:47 mini.go:12] the disk is full"
