"""Lets a disturbed training end by itself, with what an operating system does: it starts again what has ended."""

import time
from contextlib import suppress

from infra.stack.state import SERVER_NAMES
from tests.faults.campaign import invariants
from tests.faults.campaign.trial import PATIENCE, Trial


def watch(trial: Trial) -> None:
    """Starts worker and servers again whenever they have ended, until nothing runs any more; then ends the worker."""
    deadline = time.monotonic() + PATIENCE
    while not _has_ended(trial) and time.monotonic() < deadline:
        if not all(trial.home.servers(name) for name in SERVER_NAMES):
            trial.home.up()
        if trial.worker.poll() is not None:
            trial.start_worker()
        time.sleep(1)
    trial.commands[0].end(60)  # which waits for the result
    trial.worker.terminate()
    trial.noticed += [str(trial.worker)] if trial.worker.end(180).hung else []
    trial.call("doctor", "--fix").end()


def _has_ended(trial: Trial) -> bool:
    with suppress(Exception):  # servers that cannot be asked
        return bool(trial.finished()) and not invariants.open_runs(trial)
    return False
