"""`convoy sweep`: a search that an interruption does not change, whose winner is an ordinary version."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from flows.cli import training
from infra.errors import UsageError
from infra.settings import Settings
from tests.flows.conftest import Convoy
from tests.flows.program import LET_PASS, NextTraining, Program, Training, sets, wait_for

SPACE = "lr: {low: 0.02, high: 0.5, log: true}\nnetwork.width: [4, 8]\n"
KEYS = ("data.limit=400", "batch_size=32", "augment.shift=0", *LET_PASS)
SEARCH = ("--trials", "4", "--eta", "2", "--epochs", "4", "--dataset", "digits", *sets(*KEYS))


@pytest.fixture
def space(tmp_path: Path) -> str:
    (tmp_path / "space.yaml").write_text(SPACE)
    return str(tmp_path / "space.yaml")


def test_a_dry_run_prints_the_rungs_and_what_they_cost(convoy: Convoy, space: str) -> None:
    done = convoy("sweep", "--space", space, "--dry-run", "--epochs", "9")
    rows = [line.split() for line in done.stdout.splitlines()[1:-1]]
    assert rows == [["1", "27", "1", "27"], ["2", "9", "3", "18"], ["3", "3", "9", "18"]]
    assert done.stdout.splitlines()[-1] == "63 epochs, 26% of the 243 of 27 whole trainings"


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ([], "give a --space to search, or the sweep to --resume"),
        (["--space", "missing.yaml"], "cannot read the space missing.yaml: No such file"),
        (["--space", "SPACE", "--resume", "1"], "give a --space to search, or the sweep to --resume"),
        (["--resume", "1", "--trials", "3", "--epochs", "3"], "leave out --epochs, --trials"),
        (["--space", "SPACE", "--set", "launcher=nodes"], "a sweep trains on this machine"),
        (["--space", "SPACE", "--trials", "1"], "trials: "),
        (["--resume", "1", "--config", "x.yaml", "--set", "lr=1"], "leave out --set, --config"),
    ],
)
def test_mistakes_are_refused_before_anything_starts(
    convoy: Convoy, space: str, arguments: list[str], hint: str
) -> None:
    done = convoy("sweep", *(space if each == "SPACE" else each for each in arguments))
    assert (done.status, done.stdout) == (2, "")
    assert hint in done.complaint


@pytest.mark.parametrize(
    ("arguments", "hint"), [(["--space", "missing.yaml"], "missing.yaml"), (["--set", "launcher=nodes"], "launcher")]
)
def test_a_refused_configuration_or_space_is_in_the_summary(
    convoy: Convoy, space: str, tmp_path: Path, arguments: list[str], hint: str
) -> None:
    assert convoy("sweep", "--space", space, *arguments, "--summary", str(tmp_path / "out.json")).status == 2
    written = json.loads((tmp_path / "out.json").read_bytes())
    assert (written["status"], written["exit_status"]) == ("failed", 2)
    assert hint in written["error"]


def test_a_sweep_is_resumed_whatever_the_project_says_now(
    convoy: Convoy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def servers_up() -> None:
        raise UsageError("here the servers start")

    monkeypatch.setattr(training, "servers_up", servers_up)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "convoy.yaml").write_text("launcher: nodes\nepoch: 3")
    done = convoy("sweep", "--resume", "1")
    assert done.stderr == "convoy: here the servers start\n"


def trials_of(sweep: str) -> dict[int, Run]:
    client = MlflowClient()
    experiments = [each.experiment_id for each in client.search_experiments()]
    runs = client.search_runs(experiments, f"tags.`convoy.sweep` = '{sweep}'")
    numbered = [(int(run.data.tags["convoy.sweep_trial"]), run) for run in runs if run.info.run_id != sweep]
    assert len({number for number, _ in numbered}) == len(numbered)
    return dict(numbered)


def scores(run: Run) -> dict[str, float]:
    return {name: value for name, value in run.data.metrics.items() if name.startswith("sweep/rung_")}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_sweep_that_is_killed_and_stopped_finds_the_same_and_its_winner_is_that_of_one_training(
    stack: object, settings: Settings, program: Callable[..., Program], space: str, tmp_path: Path
) -> None:
    def summary(name: str) -> dict[str, Any]:
        return dict(json.loads((tmp_path / f"{name}.json").read_bytes()))

    def into(name: str) -> tuple[str, str]:
        return "--summary", str(tmp_path / f"{name}.json")

    def options(name: str) -> tuple[str, ...]:
        return "--name", f"sweep-{name}", *into(name)

    done = program("sweep", "--space", space, *SEARCH, "--at-once", "2", *options("calm")).wait(600)
    assert done.status == 0, done.stderr
    calm = summary("calm")

    first = NextTraining(settings)
    disturbed = program("sweep", "--space", space, *SEARCH, "--at-once", "1", *options("disturbed"))
    sweep = first.starts().run_id  # which has a lock there
    second = wait_for(lambda: trials_of(sweep).get(2), "the second trial")
    training = Training(settings.runs / second.info.run_id)
    wait_for(training.processes, "its ranks")
    disturbed.end()
    training.assert_ends()
    before = trials_of(sweep)
    assert set(before) == {1, 2} and scores(before[1])
    by_hand = program("resume", before[1].info.run_id).wait()
    assert by_hand.status == 2
    assert f"is a trial of a sweep; `convoy sweep --resume {sweep}` goes on with that" in by_hand.complaint
    resumed = program("sweep", "--resume", sweep, "--at-once", "1", *into("disturbed"))
    wait_for(lambda: len(trials_of(sweep)) == 4, "the last trial", 300)
    resumed.process.send_signal(signal.SIGTERM)
    stopped = resumed.wait()
    assert stopped.status == 75, stopped.stderr
    assert f"`convoy sweep --resume {sweep}` goes on" in stopped.stderr
    done = program("sweep", "--resume", sweep, *into("disturbed")).wait(600)
    assert done.status == 0, done.stderr
    found = summary("disturbed")

    assert found["weights_sha256"] == calm["weights_sha256"]
    assert {**found["sweep"], "run_id": ""} == {**calm["sweep"], "run_id": ""}
    assert found["sweep"]["epochs"] == 8 and found["sweep"]["grid_epochs"] == 16
    ours, theirs = trials_of(sweep), trials_of(calm["sweep"]["run_id"])
    assert set(ours) == set(theirs) == {1, 2, 3, 4}
    assert [scores(ours[number]) for number in ours] == [scores(theirs[number]) for number in ours]
    assert sorted(len(scores(run)) for run in ours.values()) == [1, 1, 2, 3]
    assert {run.info.status for run in ours.values()} == {"FINISHED"}
    assert MlflowClient().get_run(sweep).info.status == "FINISHED"
    assert ours[found["sweep"]["best_trial"]].info.run_id == found["mlflow_run_id"]
    assert found["model_version"] == "1"

    values = [f"{key}={value}" for key, value in found["sweep"]["values"].items()]
    direct = ("train", "--dataset", "digits", "--epochs", "4", "--ranks", "2", *sets(*KEYS, *values))
    done = program(*direct, *options("direct")).wait(300)
    assert done.status == 0, done.stderr
    assert summary("direct")["weights_sha256"] == found["weights_sha256"]

    again = program("sweep", "--resume", sweep, *into("again")).wait()
    assert again.status == 2
    assert again.complaint == f"sweep {sweep} has finished: its best trial is {found['model_name']}/1"
    assert MlflowClient().get_run(sweep).info.status == "FINISHED"


NETWORK = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, channels, image_size, classes, *, width: int = 4):
        super().__init__(nn.Flatten(), nn.Linear(channels * image_size**2, width), nn.ReLU(), nn.Linear(width, classes))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_trials_of_a_network_of_ones_own_run_at_the_same_time_and_values_that_do_not_go_together_are_left_out(
    stack: object, program: Callable[..., Program], tmp_path: Path
) -> None:
    (tmp_path / "nets.py").write_text(NETWORK)
    # Only multiples of the four lanes are batch sizes.
    (tmp_path / "space.yaml").write_text("batch_size: {low: 32, high: 36}\nnetwork.width: {low: 4, high: 32}\n")
    settings = sets("data.limit=400", "batch_size=32", "model=nets:Net", *LET_PASS)
    search = ("--space", "space.yaml", "--trials", "6", "--eta", "2", "--epochs", "2", "--dataset", "digits", *settings)
    done = program("sweep", *search, "--at-once", "3", "--name", "sweep-own", "--summary", "out.json").wait(400)
    assert done.status == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_bytes())["sweep"]
    trials = trials_of(found["run_id"])
    left_out = [line for line in done.stderr.splitlines() if "is left out, with" in line]
    assert 0 < found["failed"] == 6 - len(trials) < 6
    assert found["epochs"] == len(trials) + min(3, len(trials))  # half of six go on to the second epoch
    assert {line.split()[1] for line in left_out} == {str(number) for number in set(range(1, 7)) - set(trials)}
    assert all(int(run.data.params["batch_size"]) % 4 == 0 for run in trials.values())
    assert found["values"]["batch_size"] % 4 == 0
