"""The program of each node: joins trainings that invite nodes, runs ranks of them, and reports their state.

    python -m tasks.training.nodes.agent [RUN]      with RUN, for that training only, until it is over

It ends its ranks when the coordinator has been silent for too long. While the storage does not answer, the ranks go on:
if only this node is cut off, they end when their exchange with the other nodes times out.
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
from pathlib import Path

from cnn.distributed.process_group import check_devices, device_count
from cnn.errors import InputError
from cnn.networks.own import digests
from infra.errors import ServiceError, UsageError, counted, one_line
from infra.machine.lifeline import adopt_orphans, end_descendants
from infra.machine.network import address_towards, free_port, interface_of
from infra.machine.output import outlive_readers
from infra.settings import Settings
from infra.storage.object_store import ObjectStore, open_bucket
from tasks.training.platform import Platform, this_platform
from tasks.training.protocol.board import (
    BEAT,
    CONNECTION_LOST,
    STORAGE_TIMEOUT,
    Board,
    Heartbeat,
    Instruction,
    NodeReport,
    invited_runs,
)
from tasks.training.protocol.job import Event, Job, JobFolder, Outcome, spare_outcome
from tasks.training.protocol.patience import SUPERVISOR_WAIT
from tasks.training.torchrun import node_options, start_torchrun

END_RANKS_SECONDS = 2.0  # seconds that ranks have to end after their generation is over
POLL_SECONDS = 2.0  # seconds between two searches for an invitation
UNINVITED_SECONDS = 600.0  # that an agent of one training waits for an invitation, as long as `nodes.wait`
_LOST_IN_ERROR = re.compile(r"gloo/transport|[Cc]onnection (closed|reset)|ncclRemoteError")  # in a rank's error
PROGRESS_PER_BEAT = 4  # reports of progress that are passed on per beat
EVENTS_PER_REPORT = 100  # of the last beats, since the coordinator may miss a report

Print = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Node:
    """This machine, as coordinator and other nodes see it."""

    name: str
    address: str
    interface: str
    slots: int
    """Ranks that the node can run."""

    @classmethod
    def this_machine(cls, settings: Settings, store: ObjectStore) -> "Node":
        """Returns this node, by default with the address that reaches the storage, and one slot per device.

        Raises:
            UsageError: the address is not this machine's.
            InputError: there are more slots than GPUs.
        """
        slots = settings.slots or device_count()
        check_devices(slots)
        address = settings.address or address_towards(store.endpoint_url)
        name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
        return cls(
            name=re.sub(r"[^\w.-]", "-", name),
            address=address,
            interface=interface_of(address),
            slots=slots,
        )


class Membership:
    """A node's part in one training, from joining to leaving.

    Args:
        folder: for the training's files on this node.
        print_line: prints what happens, for people.
    """

    def __init__(self, node: Node, board: Board, job: Job, folder: JobFolder, print_line: Print) -> None:
        self._node, self._board, self._job, self._folder, self._print = node, board, job, folder, print_line
        self._heartbeat = Heartbeat()
        self._report = NodeReport(beat=0, slots=node.slots, platform=self._platform())
        self._torchrun: subprocess.Popen[bytes] | None = None
        self._told_to_stop = False
        self._events: list[Event] = []

    def run(self, leave: Callable[[], bool]) -> bool:
        """Follows the coordinator's orders until the training is over or `leave` returns True.

        Returns:
            False if the coordinator was silent for too long.
        """
        while True:
            try:
                order = self._board.order()
                if order is None and self._board.invitation() is None:
                    return True
                if order is not None:
                    self._heartbeat.beat(order.beat)
                    self._follow(order, leaving=leave())
                self._check_ranks()
                leaving = leave() and self._torchrun is None
                self._write_report(leaving=leaving)
                if leaving:
                    return True
                if self._heartbeat.silence > self._job.launch.nodes.patience:
                    self._print(f"run {self._job.run_id}: the coordinator has been silent for too long")
                    return False
            except ServiceError as error:
                self._print(f"the storage does not answer; the ranks go on: {error}")
                self._heartbeat.reset()
                if leave():  # the caller ends the ranks, which agree on the stop with those of other nodes
                    return True
            time.sleep(BEAT)

    def give_up(self, reason: str) -> None:
        """Tells the coordinator why this node cannot take part."""
        outcome = Outcome(status="crashed", error=reason, exit_status=1)
        update = {"exit_status": 1, "outcome": outcome, "trouble": reason}
        self._report = self._report.model_copy(update=update)
        self._write_report(leaving=False)

    def _platform(self) -> Platform:
        """Returns the platform that ranks would have that start now, as far as files decide it.

        An agent goes on for days, while its files may change: it imports no network, and reads the files each time.

        Raises:
            ServiceError: the files cannot be read, for example during an upgrade.
        """
        try:
            return this_platform(digests(Path.cwd(), self._job.network_files))
        except (OSError, SyntaxError) as error:
            raise ServiceError(f"the code of this node cannot be read: {error}") from error

    def _follow(self, order: Instruction, *, leaving: bool) -> None:
        if order.generation != self._report.generation:
            end_descendants(END_RANKS_SECONDS)
            self._torchrun = None
            self._events.clear()
            try:
                platform = self._platform()
            except ServiceError as error:
                self._print(f"run {self._job.run_id}: {error}")
                return
            self._report = NodeReport(
                beat=self._report.beat,
                slots=self._node.slots,
                platform=platform,
                generation=order.generation,
            )
        stopping = order.pause or leaving
        ranks = order.members.get(self._node.name, 0)
        if ranks and self._torchrun is None and self._report.exit_status is None and not stopping:
            self._start(order, ranks)
        if stopping and self._torchrun and not self._told_to_stop:
            self._torchrun.terminate()  # it forwards SIGTERM to the ranks, which agree on a step
            self._told_to_stop = True

    def _start(self, order: Instruction, ranks: int) -> None:
        """Starts torchrun, unless the leader has not reported its rendezvous yet."""
        node = self._node
        if order.leader == node.name:
            rendezvous = f"{node.address}:{free_port(node.address)}"
            self._report = self._report.model_copy(update={"meeting": rendezvous})
        else:
            leader = self._board.report(order.leader)
            if leader is None or leader.generation != order.generation or not leader.meeting:
                return
            rendezvous = leader.meeting
        self._folder = JobFolder(self._folder.path)  # one that has read no events yet
        if self._folder.log.exists():
            self._folder.start_again()
        self._folder.write_job(self._job)
        number = list(order.members).index(node.name)  # the leader is the first
        options = node_options(order.generation, rendezvous, number, len(order.members), node.address)
        with self._folder.log.open("wb") as log:
            self._torchrun = start_torchrun(
                self._folder.path, ranks=ranks, rendezvous=options, interface=node.interface, log=log.fileno()
            )
        self._told_to_stop = False
        self._print(f"run {self._job.run_id}: {counted(ranks, 'rank')} of {sum(order.members.values())} start here")

    def _check_ranks(self) -> None:
        self._take_events()
        if self._torchrun is None or (status := self._torchrun.poll()) is None:
            return
        end_descendants(END_RANKS_SECONDS)
        self._take_events()
        self._torchrun = None
        ended = {
            "exit_status": status,
            "outcome": self._folder.read_outcome(),
            "trouble": _why_ranks_died(self._folder),
        }
        self._report = self._report.model_copy(update=ended)

    def _take_events(self) -> None:
        """Takes what the ranks report: all that people have to know, and the latest of the progress."""
        new = list(self._folder.new_events())
        progress = [event for event in new if not (event.warning or event.note or event.val_accuracy is not None)]
        dropped = {id(event) for event in progress[:-PROGRESS_PER_BEAT]}
        self._events += [event for event in new if id(event) not in dropped]

    def _write_report(self, *, leaving: bool) -> None:
        latest = self._events[-EVENTS_PER_REPORT:]
        self._report = self._report.model_copy(
            update={
                "beat": self._report.beat + 1,
                "events": tuple(latest),
                "events_before": len(self._events) - len(latest),
                "leaving": leaving,
            }
        )
        self._board.write_report(self._node.name, self._report)


def _why_ranks_died(folder: JobFolder) -> str:
    """Returns why the ranks died, for people."""
    outcome = folder.read_outcome()
    if killed := folder.killed():
        return killed
    if outcome is None:
        return folder.log_end()
    return CONNECTION_LOST if _LOST_IN_ERROR.search(outcome.error) else outcome.error


def serve(
    node: Node, settings: Settings, store: ObjectStore, leave: Callable[[], bool], print_line: Print, run: str = ""
) -> bool:
    """Joins one training after another until `leave` returns True; given a `run`, joins only that.

    Returns:
        False if the coordinator of the `run` was silent for too long, or invited no node, or this node could not take
            part: the caller may try again.
    """
    invited = time.monotonic()
    print_line(f"node {node.name}: {counted(node.slots, 'rank')} at {node.address}; waiting for a training")
    silent: dict[str, Instruction | None] = {}  # last order of each coordinator that fell silent, perhaps killed
    unfit: set[str] = set()  # runs in which this node cannot take part
    while not leave():
        try:
            for run_id in [run] if run else list(invited_runs(store)):
                board = Board(store, run_id)
                invitation = board.invitation()
                fell_silent = run_id in silent and silent[run_id] == board.order()
                if invitation is None or leave() or fell_silent or run_id in unfit:
                    continue
                print_line(f"run {run_id}: joining")
                folder = JobFolder(settings.runs / run_id / "nodes" / node.name)
                membership = Membership(node, board, invitation.job, folder, print_line)
                try:
                    if not membership.run(leave):
                        silent[run_id] = board.order()
                except OSError as error:  # above all a full disk
                    print_line(f"run {run_id}: this node cannot take part: {one_line(error)}")
                    unfit.add(run_id)
                    membership.give_up(one_line(error))
                finally:
                    end_descendants(SUPERVISOR_WAIT)
                print_line(f"run {run_id}: left")
                if run:
                    return run not in silent and run not in unfit
        except ServiceError as error:
            print_line(str(error))
            invited = time.monotonic()  # there may be an invitation
        if run and time.monotonic() - invited > UNINVITED_SECONDS:
            print_line(f"run {run} has invited no node for {UNINVITED_SECONDS / 60:.0f} minutes; is it over?")
            return False
        time.sleep(POLL_SECONDS)
    return True


def main() -> int:
    received: list[int] = []
    adopt_orphans()
    for stop_signal in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop_signal, lambda number, _: received.append(number))
    settings = Settings()
    try:
        store = open_bucket(timeout=STORAGE_TIMEOUT)
        node = Node.this_machine(settings, store)
        with spare_outcome():
            if not serve(node, settings, store, lambda: bool(received), partial(print, flush=True), *sys.argv[1:2]):
                return 75
    except (ServiceError, UsageError, InputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_status", UsageError.exit_status)
    finally:
        end_descendants(SUPERVISOR_WAIT)
    if signal.SIGINT in received:
        return 128 + signal.SIGINT
    return 75 if received and sys.argv[1:] else 0  # Kubernetes replaces a pod that was told to go only if it fails


if __name__ == "__main__":
    with outlive_readers("stdout", "stderr"):  # the disk of its log may be full
        sys.exit(main())
