"""The coordinator of a training on several nodes; the tests write the nodes' reports on the board."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cnn.config.training import TrainConfig
from infra.errors import ServiceError
from infra.storage.bucket_layout import COMMIT, checkpoint
from infra.storage.object_store import ObjectStore
from tasks.config.launchers import Launch, NodesConfig
from tasks.config.run import CheckpointConfig
from tasks.training.checkpoints import Commit
from tasks.training.nodes import coordinator
from tasks.training.nodes.coordinator import Coordinator
from tasks.training.platform import this_platform
from tasks.training.protocol.board import Board, Instruction, NodeReport
from tasks.training.protocol.job import Event, Job, JobFolder, Outcome
from tasks.training.rank import is_current
from tests.flows.program import wait_for


class Play:
    """A training of two nodes under a real coordinator, in a thread."""

    def __init__(self, store: ObjectStore, folder: Path, network_files: dict[str, str]) -> None:
        job = Job(
            run_id="f00d", config=TrainConfig(), dataset_version="0" * 64, world_size=2, manifest_digest="",
            code_digest=this_platform(network_files).code_digest, network_files=network_files,
            checkpoints=CheckpointConfig(), restarts=1,
            launch=Launch(launcher="nodes", nodes=NodesConfig(min=2, max=2)),
        )  # fmt: skip
        self.folder, self.board, self.over = JobFolder(folder), Board(store, job.run_id), threading.Event()
        self.folder.write_job(job)
        self._said: dict[str, NodeReport] = {}
        self._thread = threading.Thread(target=Coordinator(self.folder).run, args=(self.over.is_set,), daemon=True)
        self._thread.start()
        wait_for(self.board.invitation, "the invitation")  # after which the coordinator clears nothing more

    def say(self, node: str, **what: object) -> None:
        """Writes the next report of a node."""
        beat = self._said[node].beat + 1 if node in self._said else 0
        self._said[node] = NodeReport.model_validate({"beat": beat, "slots": 1, "platform": this_platform(), **what})
        self.board.write_report(node, self._said[node])

    def order(self, wanted: Callable[[Instruction], bool]) -> Instruction:
        """Returns the first order that meets the condition; meanwhile the nodes repeat their last reports."""

        def find() -> Instruction | None:
            for node, said in self._said.items():
                self.say(node, **said.model_dump(exclude={"beat"}))
            found = self.board.order()
            return found if found and wanted(found) else None

        return wait_for(find, "the order")

    def ended(self) -> bool:
        return not self._thread.is_alive()


@pytest.fixture
def play(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Play]:
    """The training; the parameter is the digests of the files of its network, if that is one's own."""
    monkeypatch.setenv("CONVOY_BUCKET", store.bucket)
    monkeypatch.setattr(coordinator, "BEAT", 0.05)
    play = Play(store, tmp_path, getattr(request, "param", {}))
    yield play
    monkeypatch.setattr(coordinator, "COORDINATOR_WAIT", 0.0)  # the nodes say nothing more
    play.over.set()
    wait_for(play.ended, "the coordinator to end")


@pytest.mark.long
def test_a_checkpoint_that_is_lost_in_a_pause_only_repeats_its_steps(play: Play) -> None:
    for node in ("a", "b"):
        play.say(node)
    first = play.order(lambda order: len(order.members) == 2)
    play.say("b", generation=first.generation, leaving=True)
    play.order(lambda order: order.pause)
    lost = Outcome(status="unsaved", error="the storage did not take it", exit_status=75)
    for node in ("a", "b"):
        play.say(node, generation=first.generation, exit_status=1, outcome=lost)
    play.order(lambda order: not order.generation)
    for node in ("a", "c"):
        play.say(node)
    assert play.order(lambda order: bool(order.generation) and order.generation != first.generation).members
    assert play.folder.read_outcome() is None


@pytest.mark.long
def test_a_stop_whose_checkpoint_is_lost_on_all_nodes_is_the_outcome(play: Play) -> None:
    for node in ("a", "b"):
        play.say(node)
    first = play.order(lambda order: len(order.members) == 2)
    lost = Outcome(status="unsaved", error="the storage did not take it", exit_status=75)
    for node in ("a", "b"):
        play.say(node, generation=first.generation, exit_status=1, outcome=lost)
    wait_for(play.ended, "the coordinator to end")
    assert play.folder.read_outcome() == lost


def test_rank_zero_of_a_generation_that_was_given_up_finds_that_it_was_replaced(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    for node in ("a", "b"):
        play.say(node)
    order = play.order(lambda order: len(order.members) == 2)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", order.generation)
    assert is_current(play.board)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "an earlier one")
    assert not is_current(play.board)


@pytest.mark.long
@pytest.mark.parametrize("play", [{"nets/small.py": "1" * 64}], indirect=True)
def test_a_node_that_has_other_files_of_the_network_is_not_used(play: Play) -> None:
    for node, digest in (("a", "1"), ("b", "2"), ("c", "1")):
        play.say(node, platform=this_platform({"nets/small.py": digest * 64}))
    assert sorted(play.order(lambda order: bool(order.members)).members) == ["a", "c"]
    (told,) = (event.warning for event in play.folder.new_events() if event.warning)
    assert told.startswith("node b is not used, since its weights would differ: code_digest was ")
    assert told.endswith(f"; network_files.nets/small.py was {'1' * 64}, is {'2' * 64}")


def test_a_storage_that_refuses_for_long_ends_the_training(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(board: Board) -> dict[str, NodeReport]:
        raise ServiceError("ExpiredToken")

    for node in ("a", "b"):
        play.say(node)
    play.order(lambda order: len(order.members) == 2)
    with monkeypatch.context() as refusing:
        refusing.setattr(Board, "reports", refuse)
        refusing.setattr(coordinator, "COORDINATOR_WAIT", 0.5 - CheckpointConfig().patience)
        wait_for(play.ended, "the coordinator to end")
    outcome = play.folder.read_outcome()
    assert outcome and (outcome.status, outcome.resumable) == ("unsaved", True)
    assert "has not reached the nodes" in outcome.error and "ExpiredToken" in outcome.error
    assert [event.warning for event in play.folder.new_events() if event.warning] == [
        "the coordinator does not reach the nodes, which go on: ExpiredToken"
    ]


@pytest.mark.long
@pytest.mark.parametrize(
    ("trouble", "resumable"), [("rank 0 was killed by SIGKILL", True), ("ValueError: no such file", False)]
)
def test_a_training_whose_ranks_are_killed_too_often_may_go_on(play: Play, trouble: str, resumable: bool) -> None:
    generations = {""}
    for _ in range(2):  # of which one is the only restart
        for node in ("a", "b"):
            play.say(node)
        order = play.order(lambda order: len(order.members) == 2 and order.generation not in generations)
        generations.add(order.generation)
        play.say("a", generation=order.generation, exit_status=1, trouble=trouble)
    wait_for(play.ended, "the coordinator to end")
    outcome = play.folder.read_outcome()
    assert outcome and (outcome.status, outcome.resumable) == ("crashed", resumable)
    assert outcome.error == f"{trouble} on node a"


def test_a_wait_for_nodes_that_was_in_vain_names_the_step_from_which_a_resume_goes_on(
    play: Play, store: ObjectStore, tmp_path: Path
) -> None:
    play.folder.write_event(Event(step=480, total_steps=900, epoch=1))
    commit = Commit(step=400, manifest_digest="", files={}, train_seconds=1.0, metrics=(), committed=0.0)
    store.put_bytes(checkpoint("f00d", 400) + COMMIT, commit.model_dump_json().encode())
    waiting = Coordinator(play.folder)
    waiting._too_few_since = time.monotonic() - NodesConfig().wait
    assert waiting._form_generation()
    outcome = play.folder.read_outcome()
    assert outcome and (outcome.status, outcome.steps) == ("interrupted", 400)


@pytest.mark.long
def test_a_node_that_joins_and_fails_is_left_out_and_the_others_go_on(play: Play) -> None:
    for node in ("a", "b"):
        play.say(node)
    first = play.order(lambda order: len(order.members) == 2)
    play.say("a", generation=first.generation, events=[Event(step=1, total_steps=9, epoch=1)])
    play.say("b", generation=first.generation, leaving=True)
    play.order(lambda order: order.pause)
    stopped = Outcome(status="interrupted", exit_status=75)
    for node in ("a", "b"):
        play.say(node, generation=first.generation, exit_status=1, outcome=stopped, leaving=node == "b")
    play.order(lambda order: not order.generation)
    for node in ("a", "c"):
        play.say(node)
    second = play.order(lambda order: set(order.members) == {"a", "c"})
    error = "the disk is full"
    failed = Outcome(status="failed", error=error, exit_status=1)
    play.say("a", generation=second.generation)
    play.say("c", generation=second.generation, exit_status=1, outcome=failed, trouble=error)
    play.order(lambda order: not order.generation)
    for node in ("a", "c", "d"):
        play.say(node)
    assert play.order(lambda order: bool(order.members)).members.keys() == {"a", "d"}
    assert play.folder.read_outcome() is None
    assert f"node c is not used, since it failed: {error}" in [event.warning for event in play.folder.new_events()]
