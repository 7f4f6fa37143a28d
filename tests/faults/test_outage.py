"""Each server is away for ten minutes while a worker trains: this costs nothing but lag."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from signal import SIGKILL

import pytest
from mlflow.tracking import MlflowClient
from prefect import get_client
from prefect.client.schemas.objects import StateType

from infra.stack.state import SERVER_NAMES, ServerName
from tasks.orchestration.flow_runs import training_flow_runs
from tests.faults.campaign import invariants
from tests.faults.campaign.trial import Home, Plan, Trial
from tests.flows.program import sets, wait_for

AWAY_SECONDS = 600.0
LONG = sets("epochs=1500", "checkpoints.every=30")  # more than ten minutes of training


@pytest.fixture
def home() -> Iterator[Home]:
    with tempfile.TemporaryDirectory(prefix="convoy-outage-", ignore_cleanup_errors=True) as folder:
        made = Home(Path(folder))
        made.up()
        yield made
        made.close()


@pytest.mark.faults
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", SERVER_NAMES)
def test_ten_minutes_without_a_server_cost_nothing_but_lag(home: Home, name: ServerName) -> None:
    trial = Trial(home, Plan(1, "night", f"{name} away", "in training", 30, 0.0, AWAY_SECONDS, 2))
    trial.start(*LONG)
    trial.comes_to(lambda trial: trial.steps() >= trial.plan.step)
    worker, before = trial.worker, trial.steps()
    trial.send(SIGKILL, trial.home.servers(name))
    time.sleep(AWAY_SECONDS)
    assert worker.poll() is None
    assert trial.steps() > before  # it has gone on meanwhile
    trial.home.up()
    wait_for(trial.finished, "the training to end", 1800)
    done = trial.commands[0].end()
    assert done.returncode == 0, done.log.read_text()
    with get_client(sync_client=True) as client:
        (run,) = training_flow_runs(client, list(StateType))  # there was no resumption
    assert run.state_type == StateType.COMPLETED
    (version,) = trial.versions()
    assert version.run_id == trial.finished()
    accuracies = MlflowClient().get_metric_history(version.run_id, "val/accuracy")
    assert len({point.step for point in accuracies}) == len(accuracies) == 1500
    worker.terminate()
    assert not worker.end(180).hung
    assert not invariants.processes(trial)
