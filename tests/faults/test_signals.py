"""SIGTERM and Ctrl-C at random moments of a whole flow, imports and tail included: never ignored, nothing after."""

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from prefect import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import StateType

from infra.objectstore import ObjectStore
from infra.promotion import history
from infra.settings import Settings
from tests.flows.conftest import next_training, program
from tests.flows.program import Program, Training, wait_for
from tests.flows.test_signals import STATUS, assert_stopped, send, start

__all__ = ["next_training", "program"]  # fixtures

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]

SEED, MOMENTS = 11, 40


def running_flow_runs() -> int:
    unfinished = FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING, StateType.CANCELLING])
    with get_client(sync_client=True) as client:
        return len(client.read_flow_runs(flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=unfinished))))


def processes_of_trainings() -> list[object]:
    folders = Settings().runs.iterdir() if Settings().runs.exists() else []
    return [process for folder in folders for process in Training(folder).processes()]


def test_signals_at_random_moments(stack: object, program: Callable[..., Program], tmp_path: Path) -> None:
    chance = random.Random(SEED)
    summary = tmp_path / "out.json"
    begun = time.monotonic()
    assert start(program, "whole").wait().status == 0
    whole = time.monotonic() - begun
    rows, late = [], 0
    for number in range(MOMENTS):
        summary.unlink(missing_ok=True)
        name, sent = f"signalled-{number}", chance.choice(list(STATUS))
        moment = chance.uniform(0, whole)
        flow = start(program, name)
        time.sleep(moment)  # the moment is the test
        if flow.process.poll() is not None:  # this flow was faster than the first one
            late += 1
            assert flow.wait().status == 0
            continue
        done, when = send(flow, sent)
        took = time.time() - when.timestamp()
        promoted = len(history(ObjectStore.connect(Settings().bucket), name))
        rows.append(
            f"{number:2} {sent.name} at {moment:5.1f} s: status {done.status:3} after {took:4.1f} s, {promoted=}"
        )
        print(rows[-1])
        assert_stopped(done, sent, when, name, tmp_path)
        wait_for(lambda: not processes_of_trainings(), "the end of all processes", 30)
        assert running_flow_runs() == 0
        assert not [run for run in MlflowClient().search_runs(experiments(), "status = 'RUNNING'")]
    print(f"\na whole flow takes {whole:.1f} s; {late} moments came after its end\n" + "\n".join(rows))
    assert late < MOMENTS / 2


def experiments() -> list[str]:
    return [each.experiment_id for each in MlflowClient().search_experiments()]
