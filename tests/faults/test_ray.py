"""Trainings in a Ray cluster of several raylets on this machine: whatever happens to them, the weights are the same."""

import importlib.util
import os
import re
import secrets
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from flows.summary import Summary
from tests.conftest import USERS_OWN
from tests.flows.conftest import next_training, program, quiet_prefect
from tests.flows.program import RESUMABLE, NextTraining, Program, Training, assert_as_undisturbed, sets, wait_for
from tests.flows.test_own_network import PROJECT, TRAIN
from tests.own_project import write

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

__all__ = ["next_training", "program", "quiet_prefect"]  # fixtures

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(400),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: run `make ray`"),
]

RECIPE = (*RESUMABLE, "epochs=160", "lanes=4")
EPOCH = 12  # steps
TOKEN = secrets.token_hex(32)  # the same in all tests, since Ray reads it once per process
LOST_AFTER_SECONDS = 6  # seconds of silence after which a node is lost


@pytest.fixture(scope="module")
def undisturbed(stack: object, quiet_prefect: None) -> Summary:
    """The training on one machine."""
    from flows.train import train_flow
    from tasks.config.run import load_config

    return train_flow(load_config(None, [*RECIPE, "ranks=2"], {"dataset": "digits", "name": "without-ray"}))


class Raylets:
    """A cluster whose head has no resources for ranks, so that they run on added raylets."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.folder, self._home = folder, home
        self.cluster: Cluster = self._clean(self._start)

    def _start(self) -> "Cluster":
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": str(self.folder)}
        return Cluster(initialize_head=True, head_node_args=head)

    def add(self) -> Any:
        """Adds a raylet with resources for one rank."""
        return self._clean(lambda: self.cluster.add_node(num_cpus=1))

    def lose(self, raylet: Any) -> None:
        """Kills a raylet, by SIGKILL."""
        self.cluster.remove_node(raylet, allow_graceful=False)

    def assert_free(self) -> None:
        """Waits until Ray has no actor or group of a training left."""

        def kept() -> list[object]:
            state = self.cluster.global_state
            actors = [actor["State"] for actor in state.actor_table(None).values()]
            groups = [group["state"] for group in state.placement_group_table().values()]
            return [state for state in actors + groups if state not in ("DEAD", "REMOVED")]

        wait_for(lambda: not kept(), f"Ray to let go of {kept()}", 30)

    def _clean(self, start: Callable[[], Any]) -> Any:
        """Starts a process without the variables of Convoy's servers, so that actors must receive them."""
        ours = dict(os.environ)
        for name in ours:
            if name.startswith(USERS_OWN):
                del os.environ[name]
        os.environ["CONVOY_HOME"] = str(self._home)
        try:
            return start()
        finally:
            os.environ.clear()
            os.environ.update(ours)


@pytest.fixture
def raylets(stack: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Raylets]:
    folder = tempfile.mkdtemp(prefix="ray-")  # short, since sockets are there
    monkeypatch.setenv("RAY_TMPDIR", folder)  # the cluster's address is below it, wherever its own files are
    Path(folder, "ray").mkdir()
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    # Ray insists on an address that others can reach, where everybody could run programs else.
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    raylets = Raylets(Path(folder), tmp_path / "nodes")
    yield raylets
    raylets.cluster.shutdown()
    shutil.rmtree(folder)


Train = Callable[..., tuple[Program, Training]]


@pytest.fixture
def train(raylets: Raylets, program: Callable[..., Program], next_training: NextTraining) -> Train:
    """Starts a training on the cluster."""

    def start(name: str, *settings: str) -> tuple[Program, Training]:
        ray = ("launcher=ray", f"ray.address={raylets.cluster.address}", "ray.strategy=SPREAD", "ranks=2")
        options = sets(*RECIPE, *ray, f"nodes.patience={LOST_AFTER_SECONDS}", *settings)
        started = program("train", "--dataset", "digits", "--name", name, *options, "--summary", "out.json")
        return started, next_training.starts()

    return start


def summary(started: Program, folder: Path) -> Summary:
    done = started.wait(200)
    assert done.status == 0, done.stderr
    assert "Traceback" not in done.stderr
    return Summary.model_validate_json((folder / "out.json").read_bytes())


def processes(training: Training) -> list[psutil.Process]:
    """Returns agents, launchers and ranks of the training, by its id in their command lines."""
    found = []
    for process in psutil.process_iter():
        try:
            if training.run_id in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def worlds(training: Training) -> list[str]:
    """Returns the number of ranks per generation, from the coordinator's messages."""
    return re.findall(r'"note":"(\d+) ranks?: ', (training.folder / "events.jsonl").read_text())


def assert_nothing_left(training: Training, raylets: Raylets) -> None:
    wait_for(lambda: not processes(training), f"the end of {processes(training)}", 30)
    raylets.assert_free()


def test_two_raylets_give_the_weights_of_one_machine(
    raylets: Raylets, train: Train, undisturbed: Summary, tmp_path: Path
) -> None:
    for _ in range(2):
        raylets.add()
    started, training = train("two-raylets")
    training.comes_to(EPOCH)
    secret = os.environ["AWS_SECRET_ACCESS_KEY"].encode()
    for process in psutil.process_iter():
        try:
            assert secret not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
        except OSError:
            continue
    found = summary(started, tmp_path)
    assert_as_undisturbed(found, undisturbed)
    assert found.world_size == 2
    assert worlds(training) == ["2"]
    assert_nothing_left(training, raylets)
    logs = [file for file in raylets.folder.rglob("*") if file.is_file()]
    assert any("worker" in file.name for file in logs)
    assert [file for file in logs if secret in file.read_bytes()] == []


def test_raylets_train_a_network_of_the_working_folder(
    raylets: Raylets, program: Callable[..., Program], project: Path
) -> None:
    write(project, PROJECT)
    for _ in range(2):
        raylets.add()
    digests = set()
    for place in (["ranks=1"], ["ranks=2", "launcher=ray", f"ray.address={raylets.cluster.address}"]):
        started = program(*TRAIN, *sets(*place), "--epochs", "2", "--name", "own-on-ray", "--summary", "out.json")
        found = summary(started, project)
        digests.add(found.weights_sha256)
    assert found.world_size == 2
    assert len(digests) == 1
    raylets.assert_free()


def test_a_lost_raylet_s_rank_goes_on_where_there_is_room(
    raylets: Raylets, train: Train, undisturbed: Summary, tmp_path: Path
) -> None:
    lost = raylets.add()
    raylets.add()
    started, training = train("raylet-replaced")
    training.comes_to(5 * EPOCH)
    raylets.add()
    raylets.lose(lost)
    found = summary(started, tmp_path)
    assert_as_undisturbed(found, undisturbed)
    assert worlds(training)[-1] == "2"
    assert found.world_size == 2
    assert_nothing_left(training, raylets)


def test_without_room_fewer_ranks_go_on_until_a_raylet_is_added(
    raylets: Raylets, train: Train, undisturbed: Summary, tmp_path: Path
) -> None:
    lost = raylets.add()
    raylets.add()
    started, training = train("raylet-lost")
    training.comes_to(5 * EPOCH)
    raylets.lose(lost)
    wait_for(lambda: worlds(training) == ["2", "1"], "the other to go on")
    raylets.add()
    found = summary(started, tmp_path)
    assert_as_undisturbed(found, undisturbed)
    assert worlds(training) == ["2", "1", "2"]
    assert_nothing_left(training, raylets)


def test_killed_supervisor_takes_agents_and_ranks_along(raylets: Raylets, train: Train) -> None:
    for _ in range(2):
        raylets.add()
    _, training = train("supervisor-killed", "epochs=100000", "restarts=0")  # else the flow starts another one
    training.comes_to(EPOCH)
    for supervisor in training.processes("tasks.training.supervisor"):
        os.kill(supervisor.pid, signal.SIGKILL)
    assert_nothing_left(training, raylets)


def test_cancelled_by_a_signal_it_leaves_a_checkpoint_and_no_actor(raylets: Raylets, train: Train) -> None:
    for _ in range(2):
        raylets.add()
    started, training = train("ray-stopped", "epochs=100000")
    training.comes_to(EPOCH)
    started.process.terminate()
    started.wait(60)
    assert_nothing_left(training, raylets)


def test_no_cluster_is_one_line(stack: object, program: Callable[..., Program]) -> None:
    options = sets(*RECIPE, "launcher=ray", "ray.address=127.0.0.1:9")
    done = program("train", "--dataset", "digits", "--name", "no-cluster", *options).wait()
    assert done.status == 1
    assert "Ray cluster at 127.0.0.1:9" in done.complaint
