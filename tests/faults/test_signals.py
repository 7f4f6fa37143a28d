"""SIGTERM and Ctrl-C at random moments of a whole flow, imports and tail included: never ignored, nothing after."""

import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from prefect import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import StateType

from infra.settings import Settings
from infra.storage.object_store import ObjectStore
from infra.tracking.promotion_history import history
from tests.flows.conftest import next_training, program
from tests.flows.program import Program, Training, wait_for
from tests.flows.test_signals import STATUS, assert_stopped, send, start

__all__ = ["next_training", "program"]  # fixtures

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]

SEED, MOMENTS = 11, 40


def running() -> set[str]:
    """Ids of flow runs and MLflow runs that have not ended; a flow that another test killed may seem to run."""
    unfinished = FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING, StateType.CANCELLING])
    with get_client(sync_client=True) as client:
        flows = client.read_flow_runs(flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=unfinished)))
    experiments = [each.experiment_id for each in MlflowClient().search_experiments()]
    runs = MlflowClient().search_runs(experiments, "status = 'RUNNING'")
    return {str(flow.id) for flow in flows} | {run.info.run_id for run in runs}


def processes_of_trainings() -> list[object]:
    folders = Settings().runs.iterdir() if Settings().runs.exists() else []
    return [process for folder in folders for process in Training(folder).processes()]


@pytest.fixture(scope="module")
def whole(stack: object, tmp_path_factory: pytest.TempPathFactory) -> float:
    """Seconds that a whole flow takes, from the first instruction to the last, once files and servers are warm."""
    for name in ("cold", "warm"):
        begun = time.monotonic()
        flow = start(partial(Program, folder=tmp_path_factory.mktemp(name)), name)
        assert flow.wait(300).status == 0
    return time.monotonic() - begun


@pytest.mark.parametrize("number", range(MOMENTS))
def test_a_signal_at_a_random_moment(
    whole: float, program: Callable[..., Program], tmp_path: Path, number: int
) -> None:
    chance = random.Random(f"{SEED} {number}")
    name, sent = f"signalled-{number}", chance.choice(list(STATUS))
    moment = chance.uniform(0, whole)
    before = running()
    flow = start(program, name)
    time.sleep(moment)  # the moment is the test
    if flow.has_ended:
        assert flow.wait().status == 0
        pytest.skip(f"this flow had ended after {moment:.1f} s; the first one took {whole:.1f} s")
    done, when = send(flow, sent)
    took = time.time() - when.timestamp()
    promoted = len(history(ObjectStore.connect(Settings().bucket), name))
    print(f"\n{sent.name} at {moment:.1f} of {whole:.1f} s: status {done.status} after {took:.1f} s, {promoted=}")
    assert_stopped(done, sent, when, name, tmp_path)
    wait_for(lambda: not processes_of_trainings(), "the end of all processes", 30)
    assert running() <= before
