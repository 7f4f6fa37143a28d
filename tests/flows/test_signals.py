"""SIGTERM and Ctrl-C at chosen moments of a command; `tests/faults/test_signals.py` has random ones."""

import signal
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from prefect import get_client

from flows.summary import Summary
from infra.settings import Settings
from infra.storage.object_store import ObjectStore
from infra.tracking.promotion_history import history
from tests.flows.program import (
    LET_PASS,
    PATIENCE,
    Done,
    NextTraining,
    Program,
    flow_run_of,
    handles_signals,
    sets,
    wait_for,
)

WHOLE = ("data.limit=400", "network.width=4", "batch_size=64", "augment.shift=0", "epochs=2", "promote=true", *LET_PASS)
"""A flow that completes and promotes."""

STATUS = {signal.SIGTERM: 75, signal.SIGINT: 130}


def start(program: Callable[..., Program], name: str, **code: str) -> Program:
    train = ("train", "--dataset", "digits", "--ranks", "1", "--name", name, "--summary", "out.json")
    flow = program(*train, *sets(*WHOLE), **code)
    wait_for(lambda: handles_signals(flow.process), "the handlers")  # just after Python has started
    return flow


def send(flow: Program, sent: signal.Signals) -> tuple[Done, datetime]:
    """Send the signal; returns how the program ended, and when it was sent."""
    when = datetime.now(UTC)
    flow.process.send_signal(sent)
    return flow.wait(PATIENCE), when


def assert_stopped(done: Done, sent: signal.Signals, when: datetime, name: str, folder: Path) -> None:
    """Checks that it ended by the signal, printed nothing else, and promoted nothing afterwards."""
    assert done.status == STATUS[sent], done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr
    assert done.complaint
    summary = Summary.model_validate_json((folder / "out.json").read_bytes())
    assert (summary.status, summary.exit_status) == ("interrupted", STATUS[sent])
    for entry in history(ObjectStore.connect(Settings().bucket), name):
        assert (entry.when - when).total_seconds() < 1, f"promoted after the signal: {entry}"


@pytest.mark.parametrize("sent", STATUS)
def test_a_signal_during_imports_ends_the_command_before_anything_starts(
    program: Callable[..., Program], tmp_path: Path, sent: signal.Signals
) -> None:
    flow = start(program, "imports")
    done, when = send(flow, sent)
    assert_stopped(done, sent, when, "imports", tmp_path)


@pytest.mark.slow
def test_ctrl_c_after_the_training_promotes_nothing(
    program: Callable[..., Program], next_training: NextTraining, tmp_path: Path
) -> None:
    flow = start(program, "registering")
    training = next_training.starts()
    trained = "convoy.weights_sha256"
    wait_for(lambda: trained in MlflowClient().get_run(training.run_id).data.tags, "the weights")
    done, when = send(flow, signal.SIGINT)
    assert_stopped(done, signal.SIGINT, when, "registering", tmp_path)
    assert MlflowClient().get_run(training.run_id).info.status == "KILLED"
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(flow_run_of(training)).state
    assert state and state.name == "Crashed"


AFTER_THE_FLOW = """
import time
from flows.cli import app, training
write = training.write_summary
training.write_summary = lambda *arguments: (write(*arguments), time.sleep(3))
app.main()
"""  # else the signal may come when the program has ended


@pytest.mark.slow
def test_a_signal_after_the_flow_decides_the_status_and_the_summary(
    program: Callable[..., Program], tmp_path: Path
) -> None:
    flow = start(program, "tail", code=AFTER_THE_FLOW)
    out = tmp_path / "out.json"
    wait_for(out.exists, "the summary")
    done, _ = send(flow, signal.SIGTERM)
    assert done.status == 75
    assert "Traceback" not in done.stderr
    summary = Summary.model_validate_json(out.read_bytes())
    assert (summary.status, summary.exit_status, summary.champion) == ("interrupted", 75, True)


@pytest.mark.slow
def test_sigint_that_is_ignored_from_the_start_ends_no_training_but_sigterm_does(
    next_training: NextTraining, program: Callable[..., Program], tmp_path: Path
) -> None:
    """A shell's background job: its SIGINT was meant for the foreground."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        flow = program("train", "--dataset", "digits", "--ranks", "1", *sets(*WHOLE, "epochs=100000"))
    finally:
        signal.signal(signal.SIGINT, before)
    training = next_training.under_way()
    flow.process.send_signal(signal.SIGINT)
    steps = training.steps()
    wait_for(lambda: training.steps() > steps + 20, "more steps")
    flow.process.send_signal(signal.SIGTERM)
    assert flow.wait(PATIENCE).status == 75
    training.assert_ends()
