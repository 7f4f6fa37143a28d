"""Whatever is killed, whenever: the training goes on to the same weights and the same, single history."""

import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from mlflow.tracking import MlflowClient

from flows.summary import Summary
from infra.settings import Settings
from infra.stack.state import StackFolder
from tests.flows.conftest import Convoy, convoy, next_training, program, quiet_prefect
from tests.flows.program import (
    RESUMABLE,
    RESUMABLE_STEPS,
    NextTraining,
    Program,
    Training,
    assert_as_undisturbed,
    sets,
    wait_for,
)
from tests.flows.test_resume import undisturbed

__all__ = ["convoy", "next_training", "program", "quiet_prefect", "undisturbed"]  # fixtures

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

SEED = 20
LATEST = RESUMABLE_STEPS - 30  # step of a disturbance that must not come too late
EPOCH = 12  # steps

Find = Callable[[Program, Training], psutil.Process]
VICTIMS: dict[str, Find] = {
    "rank 0": lambda _, training: training.rank(0),
    "rank 1": lambda _, training: training.rank(1),
    "torchrun": lambda _, training: training.processes("tasks.training.torchrun")[0],
    "supervisor": lambda _, training: training.processes("tasks.training.supervisor")[0],
    "flow": lambda flow, _: psutil.Process(flow.process.pid),
}


class Case:
    """A training of its own model, which is disturbed, and resumed as often as it takes."""

    def __init__(
        self,
        start: Callable[..., Program],
        find: NextTraining,
        convoy: Convoy,
        folder: Path,
        name: str,
    ) -> None:
        self._start, self._find, self._convoy, self._folder = start, find, convoy, folder
        self._random = random.Random(f"{SEED} {name}")
        self.name = name

    def train(self, *settings: str, ranks: int = 2) -> Training:
        arguments = ("train", "--dataset", "digits", "--name", self.name, "--ranks", str(ranks))
        self.flow = self._start(*arguments, *sets(*RESUMABLE, *settings), "--summary", "out.json")
        self.training = self._find.starts()
        self.training.comes_to(1)
        return self.training

    def resume_as_program(self, ranks: int) -> None:
        """Go on, to be disturbed again."""
        assert self.training.processes() == []
        self.flow = self._start("resume", self.training.run_id, "--ranks", str(ranks), "--summary", "out.json")
        wait_for(lambda: self.training.processes("tasks.training.rank"), "the ranks to start again")
        self.training.comes_to(1)

    def some_step(self, first: int = 1, last: int = LATEST) -> int:
        step = self._random.randint(first, last)
        print(f"{self.name}: at step {step}")
        return step

    def disturb(self, victim: str, sent: signal.Signals, step: int) -> None:
        process = VICTIMS[victim](self.flow, self.training)
        self.training.comes_to(step)
        process.send_signal(sent)

    def end(self, *ranks: int) -> Summary:
        """Wait for the end, resuming with so many ranks unless the training went on by itself."""
        done = self.flow.wait()
        self.training.assert_ends()
        if done.status == 0:
            return self._summary()
        for each in ranks:
            to = str(self._folder / "out.json")
            done = self._convoy("resume", self.training.run_id, "--ranks", str(each), "--summary", to)
            assert done.status == 0, done.stderr
        return self._summary()

    def _summary(self) -> Summary:
        return Summary.model_validate_json((self._folder / "out.json").read_bytes())


@pytest.fixture
def case(
    program: Callable[..., Program],
    next_training: NextTraining,
    convoy: Convoy,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> Case:
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)
    return Case(program, next_training, convoy, tmp_path, name)


def check(case: Case, found: Summary, undisturbed: Summary) -> None:
    assert_as_undisturbed(found, undisturbed)
    assert found.mlflow_run_id == case.training.run_id
    experiments = [experiment.experiment_id for experiment in MlflowClient().search_experiments()]
    runs = MlflowClient().search_runs(experiments, f"tags.`convoy.model` = '{case.name}'")
    assert [run.info.status for run in runs] == ["FINISHED"]


@pytest.mark.parametrize("sent, victim, ranks", [
    (signal.SIGKILL, "rank 0", 1),
    (signal.SIGKILL, "rank 1", 1),
    (signal.SIGKILL, "torchrun", 1),
    (signal.SIGKILL, "supervisor", 4),
    (signal.SIGKILL, "flow", 4),
    (signal.SIGTERM, "rank 0", 1),
    (signal.SIGTERM, "rank 1", 4),
    (signal.SIGTERM, "torchrun", 2),
    (signal.SIGTERM, "flow", 1),
])  # fmt: skip
def test_signal_in_mid_training(
    case: Case,
    undisturbed: Summary,
    sent: signal.Signals,
    victim: str,
    ranks: int,
) -> None:
    case.train()
    case.disturb(victim, sent, case.some_step())
    if sent == signal.SIGTERM:
        assert case.flow.wait().status == 75
    elif victim != "flow":
        assert case.flow.wait().status == 0  # the ranks were started again, by the supervisor or by another one
    check(case, case.end(ranks), undisturbed)


def test_flow_killed_again_and_again_at_other_world_sizes(case: Case, undisturbed: Summary) -> None:
    case.train(ranks=1)
    step = case.some_step(1, 60)
    case.disturb("flow", signal.SIGKILL, step)
    case.training.assert_ends()
    for ranks in (4, 2):
        case.resume_as_program(ranks)
        step = case.some_step(step + 1, step + 40)
        case.disturb("flow", signal.SIGKILL, step)
        case.training.assert_ends()
    check(case, case.end(1), undisturbed)


def test_ranks_killed_more_often_than_restarts_allow_go_on_while_they_come_further(
    case: Case,
    undisturbed: Summary,
) -> None:
    training = case.train("restarts=1")
    for step in (40, 80, 120):
        case.disturb("rank 0", signal.SIGKILL, step)
        wait_for(lambda step=step: len(list(training.folder.glob("train.log.*"))) == step // 40, "another start")
        wait_for(lambda: len(training.processes("tasks.training.rank")) == 2, "the ranks to start again")
    check(case, case.end(), undisturbed)


@pytest.mark.parametrize("victim", ["rank 0", "torchrun", "flow"])
def test_killed_with_a_checkpoint_after_every_step(case: Case, undisturbed: Summary, victim: str) -> None:
    case.train("checkpoints.every=0")
    case.disturb(victim, signal.SIGKILL, case.some_step())
    check(case, case.end(1), undisturbed)


@pytest.fixture
def storage(settings: Settings, stack: object) -> Iterator[Callable[[signal.Signals], None]]:
    """Sends signals to the object store."""
    processes = StackFolder(settings).members("seaweedfs")

    def send(sent: signal.Signals) -> None:
        for process in processes:
            process.send_signal(sent)

    yield send
    send(signal.SIGCONT)


@pytest.mark.parametrize("victim", ["rank 0", "flow"])
def test_killed_while_a_checkpoint_is_on_its_way(
    case: Case,
    undisturbed: Summary,
    storage: Callable[[signal.Signals], None],
    victim: str,
) -> None:
    training = case.train()
    training.comes_to(case.some_step(EPOCH, LATEST - 2 * EPOCH))
    storage(signal.SIGSTOP)
    # Training does not wait for the storage; the end of an epoch has made a snapshot that cannot be stored.
    case.disturb(victim, signal.SIGKILL, training.steps() + EPOCH + 1)
    storage(signal.SIGCONT)
    check(case, case.end(4), undisturbed)


def test_storage_that_stands_still_for_a_while_changes_nothing(
    case: Case,
    undisturbed: Summary,
    storage: Callable[[signal.Signals], None],
) -> None:
    training = case.train("checkpoints.every=0")
    training.comes_to(case.some_step(EPOCH, LATEST - 2 * EPOCH))
    storage(signal.SIGSTOP)
    training.comes_to(training.steps() + EPOCH + 1)
    storage(signal.SIGCONT)
    assert case.flow.wait().status == 0
    check(case, case.end(), undisturbed)


def at_the_last_step(training: Training) -> bool:
    return training.steps() == RESUMABLE_STEPS


def once_the_weights_are_committed(training: Training) -> bool:
    return (training.folder / "outcome.json").exists()


def once_the_evaluation_is_logged(training: Training) -> bool:
    return "test/accuracy" in MlflowClient().get_run(training.run_id).data.metrics


@pytest.mark.parametrize("when", [at_the_last_step, once_the_weights_are_committed, once_the_evaluation_is_logged])
def test_flow_killed_after_the_last_step(
    case: Case,
    undisturbed: Summary,
    when: Callable[[Training], bool],
) -> None:
    training = case.train()
    wait_for(lambda: when(training), when.__name__)
    case.flow.process.kill()
    check(case, case.end(4), undisturbed)


def test_first_rank_killed_at_the_last_step(case: Case, undisturbed: Summary) -> None:
    case.train()
    case.disturb("rank 0", signal.SIGKILL, RESUMABLE_STEPS)
    check(case, case.end(), undisturbed)
