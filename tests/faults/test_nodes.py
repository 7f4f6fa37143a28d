"""Trainings on nodes in network namespaces: whatever happens to nodes and links, the weights are the same."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flows.summary import Summary
from infra.settings import Settings
from infra.stack.state import StackFolder
from tests.faults.network import Host, network, why_not
from tests.flows.conftest import quiet_prefect
from tests.flows.program import RESUMABLE, Training, assert_as_undisturbed, sets, wait_for

__all__ = ["quiet_prefect"]  # fixture

NO_HOSTS = why_not()
pytestmark = [
    pytest.mark.net,
    pytest.mark.timeout(900),
    pytest.mark.skipif(NO_HOSTS is not None, reason=str(NO_HOSTS)),
]

CONVOY = [sys.executable, "-P", "-c", "from flows.cli import main; main()"]
RECIPE = (*RESUMABLE, "epochs=80", "lanes=4")
EPOCH = 12  # steps
STEPS = 80 * EPOCH
LOST_AFTER_SECONDS = 6  # seconds of silence after which a node is lost


@pytest.fixture(scope="module")
def undisturbed(stack: object, quiet_prefect: None) -> Summary:
    """The training on one machine."""
    from flows.train import train_flow
    from tasks.config.run import load_config

    return train_flow(load_config(None, [*RECIPE, "ranks=2"], {"dataset": "digits", "name": "one-machine"}))


class Cluster:
    """Hosts on which `convoy` runs, each with a state folder of its own."""

    def __init__(self, hosts: list[Host], folder: Path) -> None:
        self.hosts, self._folder = hosts, folder

    def convoy(self, host: Host, *arguments: str, slots: int) -> subprocess.Popen[bytes]:
        folder = self._home(host)
        folder.mkdir(exist_ok=True)
        environment = os.environ | {"CONVOY_HOME": str(folder / ".convoy"), "COLUMNS": "80"}
        environment |= {"CONVOY_ADDRESS": host.address, "CONVOY_SLOTS": str(slots)}
        log = folder / f"{arguments[0]}.log"
        return host.start([*CONVOY, *arguments], folder=folder, log=log, environment=environment)

    def train(self, name: str, *settings: str, slots: int = 1, recipe: tuple[str, ...] = RECIPE) -> "Flow":
        """Starts a training on the first host, which is also a node, with the given number of ranks."""
        nodes = ("launcher=nodes", f"nodes.patience={LOST_AFTER_SECONDS}", *settings)
        arguments = ("train", "--dataset", "digits", "--name", name, *sets(*recipe, *nodes), "--summary", "out.json")
        return Flow(self.convoy(self.hosts[0], *arguments, slots=slots), self._home(self.hosts[0]))

    def join(self, number: int, *arguments: str, slots: int = 1) -> subprocess.Popen[bytes]:
        return self.convoy(self.hosts[number], "join", *arguments, slots=slots)

    def log(self, number: int, command: str) -> str:
        return (self._home(self.hosts[number]) / f"{command}.log").read_text()

    def _home(self, host: Host) -> Path:
        return self._folder / host.name


class Flow:
    """`convoy train` on the first host."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        self.process, self._folder = process, folder

    def training(self) -> Training:
        """Waits until the training is about to start."""
        runs = self._folder / ".convoy" / "runs"
        (folder,) = wait_for(lambda: runs.exists() and [*runs.glob("*/job.json")], "a training to start")
        return Training(folder.parent)

    def end(self, status: int = 0, patience: float = 400.0) -> Summary:
        found = self.process.wait(patience)
        log = (self._folder / "train.log").read_text()
        assert found == status, log
        assert "Traceback" not in log, log
        print(log)
        return Summary.model_validate_json((self._folder / "out.json").read_bytes())


@pytest.fixture
def hosts(stack: object, settings: Settings, tmp_path: Path) -> Iterator[Callable[[int], Cluster]]:
    """Makes the given number of hosts; all their processes end with the test."""
    ports = StackFolder(settings).ports
    running = []

    def make(count: int) -> Cluster:
        running.append(network(count, [ports.s3, ports.mlflow, ports.prefect]))
        return Cluster(running[-1].__enter__(), tmp_path)

    yield make
    for each in running:
        each.__exit__(None, None, None)


def where(training: Training) -> list[str]:
    """Returns the nodes of each generation, from the coordinator's messages."""
    events = training.folder / "events.jsonl"
    text = events.read_text() if events.exists() else ""
    return re.findall(r'"note":"(\d+ ranks?: [^"]*)"', text)


def test_two_hosts_give_the_weights_of_one(hosts: Callable[[int], Cluster], undisturbed: Summary) -> None:
    cluster = hosts(2)
    flow = cluster.train("two-hosts", "nodes.min=2")
    cluster.join(1)
    training = flow.training()
    training.comes_to(EPOCH)
    for host in cluster.hosts:  # other users cannot read the credentials anywhere
        for pid in host.pids():
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
            assert os.environ["AWS_SECRET_ACCESS_KEY"] not in command
    found = flow.end()
    assert_as_undisturbed(found, undisturbed)
    assert found.world_size == 2
    (generation,) = where(training)
    assert generation.startswith("2 ranks: 1 on ")


def test_three_hosts_with_different_numbers_of_ranks(hosts: Callable[[int], Cluster], undisturbed: Summary) -> None:
    cluster = hosts(3)
    flow = cluster.train("three-hosts", "nodes.min=3", slots=2)
    for number in (1, 2):
        cluster.join(number)
    found = flow.end()
    assert_as_undisturbed(found, undisturbed)
    assert found.world_size == 4
    assert "left" in cluster.log(2, "join")


@pytest.mark.parametrize("how", ["power", "processes"])
def test_a_lost_host_is_replaced_by_one_that_stands_by(
    hosts: Callable[[int], Cluster], undisturbed: Summary, how: str
) -> None:
    cluster = hosts(3)
    flow = cluster.train(f"lost-{how}", "nodes.min=2", "ranks=2")
    cluster.join(1)
    training = flow.training()
    training.comes_to(STEPS // 10)
    cluster.join(2)
    wait_for(lambda: "joining" in cluster.log(2, "join"), "the host that stands by")
    cluster.hosts[1].lose_power() if how == "power" else cluster.hosts[1].kill()
    found = flow.end()
    assert_as_undisturbed(found, undisturbed)
    assert found.world_size == 2
    assert len(where(training)) == 2


def test_training_pauses_with_too_few_hosts_and_goes_on_with_others(
    hosts: Callable[[int], Cluster], undisturbed: Summary
) -> None:
    cluster = hosts(3)
    flow = cluster.train("too-few", "nodes.min=2", "nodes.wait=5")
    cluster.join(1)
    training = flow.training()
    training.comes_to(STEPS // 10)
    cluster.hosts[1].lose_power()
    paused = flow.end(75)
    assert paused.error and "nodes.min 2" in paused.error and training.run_id in paused.error
    training.assert_ends()
    cluster.join(2)
    arguments = ("resume", training.run_id, "--summary", "out.json")
    resumed = cluster.convoy(cluster.hosts[0], *arguments, slots=1)
    assert resumed.wait(400) == 0, cluster.log(0, "resume")
    out = cluster._home(cluster.hosts[0]) / "out.json"
    assert_as_undisturbed(Summary.model_validate_json(out.read_bytes()), undisturbed)


@pytest.mark.parametrize("seconds", [20.0, None], ids=["20 s", "for ever"])
def test_a_cut_link(hosts: Callable[[int], Cluster], undisturbed: Summary, seconds: float | None) -> None:
    cluster = hosts(2)
    flow = cluster.train(f"cut-{seconds or 'forever'}".replace(".", "-"))
    cluster.join(1)
    training = flow.training()
    wait_for(lambda: any(line.startswith("2 ranks") for line in where(training)), "both hosts to train")
    cut_at = training.steps() + EPOCH
    training.comes_to(cut_at)
    cluster.hosts[1].cut()
    if seconds:
        time.sleep(seconds)
        cluster.hosts[1].mend()
    found = flow.end()
    assert_as_undisturbed(found, undisturbed)
    worlds = [line.split(" ")[0] for line in where(training)]
    assert worlds[-2:] == (["1", "2"] if seconds else ["2", "1"])


def test_a_host_that_comes_later_and_leaves_again(hosts: Callable[[int], Cluster], undisturbed: Summary) -> None:
    cluster = hosts(2)
    flow = cluster.train("comes-and-leaves")
    training = flow.training()
    training.comes_to(EPOCH)
    late = cluster.join(1)
    wait_for(lambda: len(where(training)) == 2, "the late host to train")
    begun = training.steps()
    training.comes_to(begun + EPOCH)
    for pid in cluster.hosts[1].pids():  # the agent, which `convoy join` has become
        if b"tasks.training.nodes.agent" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGTERM)
    assert late.wait(60) == 0
    assert cluster.hosts[1].pids() == []
    found = flow.end()
    assert_as_undisturbed(found, undisturbed)
    assert [line.split(" ")[0] for line in where(training)] == ["1", "2", "1"]


def test_no_rank_outlives_a_flow_whose_host_is_lost(hosts: Callable[[int], Cluster], stack: object) -> None:
    cluster = hosts(2)
    flow = cluster.train("flow-lost", "nodes.min=2", "epochs=100000")
    cluster.join(1)
    flow.training().comes_to(EPOCH)
    cluster.hosts[0].lose_power()

    def ranks() -> list[int]:
        return [
            pid
            for pid in cluster.hosts[1].pids()
            if b"tasks.training.rank" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]

    assert ranks()
    wait_for(lambda: not ranks(), "the ranks to end", 30 + LOST_AFTER_SECONDS)
    assert "silent for too long" in cluster.log(1, "join")


@pytest.mark.parametrize(
    "discipline",
    [("netem", "delay", "20ms", "5ms", "loss", "1%"), ("tbf", "rate", "20mbit", "burst", "64kb", "latency", "100ms")],
    ids=["loss and delay", "narrow"],
)
def test_a_bad_network(hosts: Callable[[int], Cluster], undisturbed: Summary, discipline: tuple[str, ...]) -> None:
    cluster = hosts(2)
    try:
        cluster.hosts[1].shape(*discipline)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"run it on a kernel with {discipline[0]}: {error.stderr.decode().strip()}")
    flow = cluster.train(f"bad-network-{discipline[0]}", "nodes.min=2")
    cluster.join(1)
    found = flow.end()
    assert_as_undisturbed(found, undisturbed)
    assert found.world_size == 2
