"""A signal is recorded whenever it arrives, and decides how the program ends; with real programs and real signals."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.conftest import REPOSITORY

BEGIN = """
import os, signal, sys, threading, time, weakref
from infra.machine import stopping
stopping.listen()
def say(word): print(word, flush=True)
def run(work):
    try:
        stopping.attended(work)
        status = 0
    except stopping.Stopped as stopped:
        status = stopped.exit_status
    stopping.end(status)
"""
LOOKS = """
def work():
    say("ready")
    while True: stopping.sleep(60)
run(work)
"""
STUCK = """
def work():
    say("ready")
    time.sleep(60)
run(work)
"""
IN_CALLBACKS = """
class Thing: pass
def count(_): sum(range(300))
def work():
    say("ready")
    while True:
        weakref.ref(thing := Thing(), count)
        del thing
        stopping.check()
run(work)
"""
TAIL = """
stopping.at_end(lambda stopped: say(f"corrected: {stopped}"))
import atexit
atexit.register(lambda: (say("ready"), time.sleep(60)))
run(lambda: None)
"""
TOO_LATE = """
stopping.at_end(lambda stopped: say(f"corrected: {stopped}"))
def work():
    say("ready")
    stopping.wait(60)
run(work)
"""
IMPORTING = """
say("ready")
stopping.wait(60)
run(stopping.check)
"""
EMBEDDED = """
signal.signal(signal.SIGTERM, lambda *_: (say("ours"), sys.exit(7)))
stopping.listen()
say("ready")
stopping.attended(lambda: signal.sigtimedwait([signal.SIGUSR1], 60))
"""
TIMER = """
signal.signal(signal.SIGALRM, lambda *_: None)
say("ready")
def work():
    for _ in range(100): os.kill(os.getpid(), signal.SIGALRM)
    began = time.monotonic()
    stopping.wait(0.2)
    if time.monotonic() - began >= 0.2: say("waited")
    os.kill(os.getpid(), signal.SIGTERM)
    stopping.sleep(20)
run(work)
"""
STATUS = {signal.SIGTERM: 75, signal.SIGINT: 130}
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a program, and waits until it reports that it is ready."""
    started: list[subprocess.Popen[str]] = []

    def run(program: str, begin: str = BEGIN, **options: Any) -> "subprocess.Popen[str]":
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen([sys.executable, "-c", begin + program], cwd=REPOSITORY, **pipes, **options)
        started.append(process)
        assert process.stdout and process.stdout.readline() == "ready\n"
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("sent", STATUS)
@pytest.mark.parametrize("program", [LOOKS, IN_CALLBACKS, IMPORTING], ids=["waiting", "in callbacks", "importing"])
def test_a_signal_ends_the_work_at_its_next_look(start: Start, program: str, sent: signal.Signals) -> None:
    process = start(program)
    process.send_signal(sent)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (STATUS[sent], "", "")


@pytest.mark.parametrize("sent", STATUS)
@pytest.mark.parametrize("program", [TAIL, TOO_LATE], ids=["while the interpreter ends", "when all is done"])
def test_a_signal_that_comes_too_late_still_decides_the_status(
    start: Start, program: str, sent: signal.Signals
) -> None:
    process = start(program)
    process.send_signal(sent)
    out, err = process.communicate(timeout=30)
    said = "interrupted" if sent == signal.SIGINT else "ended by SIGTERM"
    assert (process.returncode, out, err) == (STATUS[sent], f"corrected: {said}\n", f"convoy: {said}\n")


def test_what_does_not_look_for_signals_is_ended_by_the_third(start: Start) -> None:
    process = start(STUCK)
    process.send_signal(signal.SIGINT)
    for _ in range(3):
        process.send_signal(signal.SIGTERM)  # which is not a press of Ctrl-C
    presses = 1
    while True:  # a busy program handles a press late, and two together count as one: then it takes one more
        try:
            process.wait(0.5)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            presses += 1
    assert process.stderr
    said = "\nstopping at the end of this step; press Ctrl-C again to stop immediately\n"
    assert (process.returncode, process.stderr.read()) == (130, said)
    assert presses >= 3


def test_signals_of_the_program_itself_neither_shorten_waits_nor_hide_a_stop(start: Start) -> None:
    """As in a program that calls Convoy's functions, and has a timer."""
    process = start(TIMER)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (75, "waited\n", "")


def test_a_signal_that_is_ignored_from_the_start_stays_so(start: Start) -> None:
    """As a shell's background jobs ignore SIGINT."""
    process = start(LOOKS, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75


def test_a_program_that_handles_signals_itself_goes_on_to_do_so(start: Start) -> None:
    process = start(EMBEDDED, begin=BEGIN.replace("stopping.listen()\n", ""))
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (7, "ours\n")


IN_PARALLEL = """
from infra.machine.threads import in_parallel
ended = threading.Event()
def item(number):
    if number == 0: say("ready")
    ended.wait(20)
def work(): in_parallel(item, range(3), ended, threads=2)
run(work)
"""
PROGRAM = """
from infra.fetch.packages import run_program
def work():
    program = f"echo ready > /proc/{os.getpid()}/fd/1; exec sleep 20"
    run_program(["sh", "-c", program], what="the sleep", seconds=60, environment=os.environ)
run(work)
"""


@pytest.mark.parametrize("program", [IN_PARALLEL, PROGRAM], ids=["threads", "another program"])
def test_a_signal_ends_waits_for_threads_and_for_other_programs(start: Start, program: str) -> None:
    process = start(program)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 75
