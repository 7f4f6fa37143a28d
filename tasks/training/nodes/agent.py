"""The program of each node: looks for trainings that want nodes, runs its ranks of them, and says how they do.

    python -m tasks.training.nodes.agent [RUN]      with RUN, for that training only, until it is over

It ends its ranks when the coordinator has been silent for too long. While it is the storage that does not answer, they
go on: should this node be cut off, they end by themselves when the exchange with the others times out.
"""

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import FrameType

from cnn.distributed.process_group import device_count
from infra.errors import ServiceError, UsageError
from infra.machine.lifeline import adopt_orphans, end_descendants
from infra.machine.network import address_towards, free_port, interface_of
from infra.settings import Settings
from infra.storage.object_store import ObjectStore, open_bucket
from tasks.training.platform import Platform, this_platform
from tasks.training.protocol.board import ANSWERS_WITHIN, BEAT, Board, Heartbeat, Instruction, NodeReport, invited
from tasks.training.protocol.job import Event, Job, JobFolder, spare_outcome
from tasks.training.protocol.patience import OWNER
from tasks.training.torchrun import among_nodes, start_torchrun

HURRY = 2.0  # seconds that ranks have which wait for others that are gone
LOOK_EVERY = 2.0  # seconds between looks for a training
CUT_OFF = re.compile(r"gloo/transport|[Cc]onnection (closed|reset)|ncclRemoteError")  # in what a rank died of
EVENTS = 32  # of the last ones, told at each beat

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Node:
    """This machine, as the others see it."""

    name: str
    address: str
    interface: str
    slots: int
    """Ranks that it can run."""

    platform: Platform

    @classmethod
    def this_machine(cls, settings: Settings, store: ObjectStore) -> "Node":
        """By the settings; unset, the address that reaches the storage, and a rank for each GPU or core.

        Raises:
            UsageError: the address is not this machine's.
        """
        address = settings.address or address_towards(store.endpoint_url)
        name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
        return cls(
            name=re.sub(r"[^\w.-]", "-", name),
            address=address,
            interface=interface_of(address),
            slots=settings.slots or device_count(),
            platform=this_platform(),
        )


class Membership:
    """A node's part in one training, from joining to its end.

    Args:
        node: this machine.
        board: of the training.
        job: its order to train.
        folder: where this node keeps files of it.
        say: told in a line what happens, for people.
    """

    def __init__(self, node: Node, board: Board, job: Job, folder: JobFolder, say: Say) -> None:
        self._node, self._board, self._job, self._folder, self._say = node, board, job, folder, say
        self._heartbeat = Heartbeat()
        self._report = NodeReport(beat=0, slots=node.slots, platform=node.platform)
        self._torchrun: subprocess.Popen[bytes] | None = None
        self._told_to_stop = False
        self._events: list[Event] = []

    def run(self, leave: Callable[[], bool]) -> bool:
        """Follow the coordinator until the training is over, or this node is to `leave`.

        Returns:
            False if the coordinator has fallen silent.
        """
        while True:
            try:
                order = self._board.order()
                if order is None and self._board.invitation() is None:
                    return True
                if order is not None:
                    self._heartbeat.beat(order.beat)
                    self._follow(order, leaving=leave())
                self._look_at_ranks()
                leaving = leave() and self._torchrun is None
                self._tell(leaving=leaving)
                if leaving:
                    return True
                if self._heartbeat.silence > self._job.launch.nodes.patience:
                    self._say(f"run {self._job.run_id}: the coordinator has been silent for too long")
                    return False
            except ServiceError as error:
                self._say(f"going on without news: {error}")
                self._heartbeat.reset()
                if leave():  # the caller ends the ranks; those of other nodes agree on the stop with them
                    return True
            time.sleep(BEAT)

    def _follow(self, order: Instruction, *, leaving: bool) -> None:
        if order.generation != self._report.generation:
            end_descendants(HURRY)
            self._torchrun = None
            self._events.clear()
            self._report = NodeReport(
                beat=self._report.beat,
                slots=self._node.slots,
                platform=self._node.platform,
                generation=order.generation,
            )
        stopping = order.pause or leaving
        ranks = order.members.get(self._node.name, 0)
        if ranks and self._torchrun is None and self._report.exit_status is None and not stopping:
            self._start(order, ranks)
        if stopping and self._torchrun and not self._told_to_stop:
            self._torchrun.terminate()  # it tells the ranks, which agree on a step
            self._told_to_stop = True

    def _start(self, order: Instruction, ranks: int) -> None:
        """Start torchrun, as soon as it is known where to meet."""
        node = self._node
        leads = order.leader == node.name
        if leads:
            meeting = f"{node.address}:{free_port(node.address)}"
            self._report = self._report.model_copy(update={"meeting": meeting})
        else:
            leader = self._board.report(order.leader)
            if leader is None or leader.generation != order.generation or not leader.meeting:
                return
            meeting = leader.meeting
        self._folder = JobFolder(self._folder.path)  # which has read no events yet
        if self._folder.log.exists():
            self._folder.start_again()
        self._folder.write_job(self._job)
        number = list(order.members).index(node.name)  # the leader is the first
        options = among_nodes(order.generation, meeting, number, len(order.members), node.address)
        with self._folder.log.open("wb") as log:
            self._torchrun = start_torchrun(
                self._folder.path, ranks=ranks, meeting=options, interface=node.interface, log=log.fileno()
            )
        self._told_to_stop = False
        self._say(f"run {self._job.run_id}: {ranks} ranks of {sum(order.members.values())} start here")

    def _look_at_ranks(self) -> None:
        self._events += self._folder.new_events()
        if self._torchrun is None or (status := self._torchrun.poll()) is None:
            return
        end_descendants(HURRY)
        self._events += self._folder.new_events()
        self._torchrun = None
        self._report = self._report.model_copy(
            update={
                "exit_status": status,
                "outcome": self._folder.read_outcome(),
                "trouble": _trouble(self._folder),
            }
        )

    def _tell(self, *, leaving: bool) -> None:
        latest = self._events[-EVENTS:]
        self._report = self._report.model_copy(
            update={
                "beat": self._report.beat + 1,
                "events": tuple(latest),
                "events_before": len(self._events) - len(latest),
                "leaving": leaving,
            }
        )
        self._board.write_report(self._node.name, self._report)


def _trouble(folder: JobFolder) -> str:
    """What people should know of ranks that died, in a few words."""
    outcome = folder.read_outcome()
    if killed := folder.killed():
        return killed
    if outcome is None:
        return folder.log_end()
    return "the connection to another node was lost" if CUT_OFF.search(outcome.error) else outcome.error


def serve(
    node: Node, settings: Settings, store: ObjectStore, leave: Callable[[], bool], say: Say, run: str = ""
) -> bool:
    """Take part in one training after another, until this node is to `leave`; given a `run`, only in that.

    Returns:
        False if the coordinator of the `run` has fallen silent: whoever started this may try again.
    """
    say(f"node {node.name}: {node.slots} ranks at {node.address}; waiting for a training")
    silent: dict[str, Instruction | None] = {}  # what was last heard of coordinators that were killed, perhaps
    while not leave():
        try:
            for run_id in [run] if run else list(invited(store)):
                board = Board(store, run_id)
                invitation = board.invitation()
                if invitation is None or leave() or (run_id in silent and silent[run_id] == board.order()):
                    continue
                say(f"run {run_id}: joining")
                folder = JobFolder(settings.runs / run_id / "nodes" / node.name)
                try:
                    if not Membership(node, board, invitation.job, folder, say).run(leave):
                        silent[run_id] = board.order()
                finally:
                    end_descendants(OWNER)
                say(f"run {run_id}: left")
                if run:
                    return run not in silent
        except ServiceError as error:
            say(str(error))
        time.sleep(LOOK_EVERY)
    return True


def main() -> int:
    told: list[int] = []

    def on_signal(number: int, _: FrameType | None) -> None:
        told.append(number)

    adopt_orphans()
    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    settings = Settings()
    try:
        store = open_bucket(timeout=ANSWERS_WITHIN)
        node = Node.this_machine(settings, store)
        say = partial(print, flush=True)
        with spare_outcome():
            if not serve(node, settings, store, lambda: bool(told), say, *sys.argv[1:2]):
                return 75
    except (ServiceError, UsageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    finally:
        end_descendants(OWNER)
    return 128 + told[0] if told == [signal.SIGINT] else 0


if __name__ == "__main__":
    sys.exit(main())
