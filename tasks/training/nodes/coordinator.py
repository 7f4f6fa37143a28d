"""Decides which nodes train together, and forms the next generation when a node is lost, joins or leaves."""

import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress

from infra.errors import ServiceError, counted
from infra.storage.object_store import open_bucket
from tasks.training.checkpoints import commits_of
from tasks.training.nodes.plan import plan
from tasks.training.platform import Platform, differences, this_platform
from tasks.training.protocol.board import (
    BEAT,
    CONNECTION_LOST,
    STORAGE_TIMEOUT,
    Board,
    Heartbeat,
    Instruction,
    Invitation,
    NodeReport,
)
from tasks.training.protocol.job import STARTING, Event, JobFolder, Outcome, Restarts, Status
from tasks.training.protocol.patience import COORDINATOR_WAIT

SETTLE_SECONDS = 5.0  # seconds without a change of the ready nodes before a generation is formed or enlarged
STALE_SECONDS = 4 * BEAT  # seconds of silence after which a node does not join a generation


class Coordinator:
    """Runs one training to its end, over as many generations of nodes as needed.

    Args:
        folder: of the job, on this machine; receives the ranks' events and outcome.
    """

    def __init__(self, folder: JobFolder) -> None:
        self._folder, self._job = folder, folder.read_job()
        self._nodes = self._job.launch.nodes
        self._store = open_bucket(timeout=STORAGE_TIMEOUT)
        self._board = Board(self._store, self._job.run_id)
        self._order = Instruction(beat=0)
        self._reports: dict[str, NodeReport] = {}
        self._heartbeats: dict[str, Heartbeat] = {}
        # A machine that only coordinates may have another kind of processor: then the first node decides.
        here = self._job.launch.launcher == "nodes" and self._nodes.here
        self._platform: Platform | None = this_platform(self._job.network_files) if here else None
        self._refused: set[str] = set()
        self._unfit: set[str] = set()  # nodes that have ended a generation of proven ones
        self._proven: set[str] = set()  # nodes of a generation that has made a step
        self._passed_on: dict[str, int] = {}  # number of events per member of this generation
        self._ready: frozenset[str] = frozenset()
        self._ready_changed = time.monotonic()  # time of the last change of _ready
        self._too_few_since: float | None = time.monotonic()
        self._formed = 0.0
        self._paused: float | None = None
        self._cut_off_since: float | None = None  # time of the first of the storage's failures in a row
        self._restarts = Restarts(folder)

    def run(self, wants_end: Callable[[], bool]) -> None:
        """Coordinates until the training is over; the outcome is then in the folder, if there is one.

        Args:
            wants_end: returns whether the task has ended or asks for a stop.
        """
        try:
            self._board.clear()
            self._board.invite(Invitation(job=self._job))
            while not self._beat(ending=wants_end()):
                time.sleep(BEAT)
        finally:
            with suppress(ServiceError):  # the agents notice that this coordinator is silent
                self._board.clear()

    def _beat(self, *, ending: bool) -> bool:
        """Reads the reports and writes the next order; returns whether the training is over."""
        if ending and self._paused is None:
            self._paused = time.monotonic()
        try:
            self._read_reports()
            over = self._check_generation(ending=ending) if self._order.members else ending or self._form_generation()
            self._order = self._order.model_copy(
                update={"beat": self._order.beat + 1, "pause": self._paused is not None}
            )
            self._board.write_order(self._order)
            if self._cut_off_since is not None:
                self._cut_off_since = None
                self._folder.write_event(Event(note="the coordinator reaches the nodes again"))
            return over
        except ServiceError as error:
            # The ranks go on meanwhile. This machine could not read the reports, so no node counts as silent.
            for heartbeat in self._heartbeats.values():
                heartbeat.reset()
            return self._cut_off_for_long(error) or (ending and self._paused_for > COORDINATOR_WAIT)

    def _cut_off_for_long(self, error: ServiceError) -> bool:
        """Warns at the first failure of the storage; after the patience for checkpoints, ends the training."""
        if self._cut_off_since is None:
            self._cut_off_since = time.monotonic()
            self._folder.write_event(Event(warning=f"the coordinator does not reach the nodes, which go on: {error}"))
        if time.monotonic() - self._cut_off_since < self._job.checkpoints.patience + COORDINATOR_WAIT:
            return False
        why = f"the coordinator has not reached the nodes for {self._job.checkpoints.patience:g} s: {error}"
        self._folder.write_outcome(Outcome(status="unsaved", error=why, exit_status=error.exit_status, resumable=True))
        return True

    def _read_reports(self) -> None:
        self._reports = self._board.reports()
        for node, report in self._reports.items():
            self._heartbeats.setdefault(node, Heartbeat()).beat(report.beat)
        for node, report in self._members().items():
            for event in report.events[max(0, self._passed_on.get(node, 0) - report.events_before) :]:
                self._folder.write_event(event)
                if event.step and not event.waiting:
                    self._proven |= set(self._order.members)
            self._passed_on[node] = report.events_before + len(report.events)
        ready = frozenset(self._candidates())
        if ready != self._ready:
            self._ready, self._ready_changed = ready, time.monotonic()

    def _check_generation(self, *, ending: bool) -> bool:
        """Checks on the generation that trains; returns whether the training is over."""
        members = self._members()
        ended = {node: report for node, report in members.items() if report.exit_status is not None}
        outcomes = {report.outcome.status: report.outcome for report in ended.values() if report.outcome}
        all_ended = len(ended) == len(self._order.members)
        patience = self._nodes.patience
        alive = {node for node, heartbeat in self._heartbeats.items() if heartbeat.silence <= patience}
        lost = [node for node in self._order.members if node not in alive]
        if self._paused is None and self._refuse_newcomers(ended):
            return False
        # If the checkpoint of a pause cannot be stored, the next generation only repeats its steps.
        final: list[Status] = ["finished", "failed", "diverged"]
        if self._paused is None:
            final.append("unsaved")
        if outcome := next((outcomes[status] for status in final if status in outcomes), None):
            self._folder.write_outcome(outcome)
            return True
        if self._paused is None and ("interrupted" in outcomes or any(report.leaving for report in members.values())):
            self._paused = time.monotonic()  # a node leaves; the other nodes may not know yet
        if self._paused is not None:
            if not (all_ended or self._paused_for > COORDINATOR_WAIT or lost):
                return False
            if ending and "interrupted" in outcomes:
                self._folder.write_outcome(outcomes["interrupted"])
            self._end_generation()
            return ending
        if lost:
            return self._retry(f"node {', '.join(lost)} has been silent for {patience:g} s", {}, resumable=True)
        if troubles := [f"{report.trouble} on node {node}" for node, report in ended.items() if report.exit_status]:
            killed = next((trouble for trouble in troubles if "was killed by" in trouble), None)
            return self._retry(killed or troubles[0], {} if killed else outcomes, resumable=killed is not None)
        if all_ended:
            return self._retry("the ranks ended without an outcome", outcomes)
        if self._could_grow():
            self._folder.write_event(Event(note="more nodes are ready: storing a checkpoint, to go on with them"))
            self._paused = time.monotonic()
        return False

    def _refuse_newcomers(self, ended: Mapping[str, NodeReport]) -> bool:
        """Ends a generation that fails because of nodes that joined last, as with a full disk; others go on without.

        Returns:
            Whether it has: not if a node that has trained before fails by itself too, or if all are new.
        """
        failed = {
            node
            for node, report in ended.items()
            if report.outcome and report.outcome.status in ("failed", "crashed") and report.trouble != CONNECTION_LOST
        }
        if not failed or failed & self._proven or not self._proven & self._order.members.keys():
            return False
        for node in failed:
            self._unfit.add(node)
            self._folder.write_event(Event(warning=f"node {node} is not used, since it failed: {ended[node].trouble}"))
        self._end_generation()
        return True

    def _retry(self, reason: str, outcomes: Mapping[Status, Outcome], *, resumable: bool = False) -> bool:
        """Ends the generation, so that the next one resumes; returns True if no restart is left.

        Args:
            resumable: the training itself did not fail, but machines or processes were killed.
        """
        if not self._restarts.take():
            last = Outcome(status="crashed", error=reason, exit_status=1, resumable=resumable)
            self._folder.write_outcome(outcomes.get("crashed", last))
            return True
        self._folder.write_event(Event(warning=f"{reason}; going on from the last checkpoint", waiting=STARTING))
        self._end_generation()
        self._ready_changed = time.monotonic()  # it takes a while until a dead node counts as silent
        return False

    def _end_generation(self) -> None:
        self._order = Instruction(beat=self._order.beat)
        self._paused = None
        self._passed_on.clear()
        self._too_few_since = None

    def _form_generation(self) -> bool:
        """Forms a generation once enough nodes are ready; returns whether the wait for nodes has ended the training."""
        now = time.monotonic()
        chosen = self._plan()
        if len(self._ready) < self._nodes.min or not chosen:
            self._too_few_since = self._too_few_since or now
            if now - self._too_few_since < self._nodes.wait:
                return False
            error = f"only {len(self._ready)} nodes for {self._nodes.wait:g} s, fewer than nodes.min {self._nodes.min}"
            newest = next(commits_of(self._store, self._job.run_id), None)
            steps = newest.step if newest else 0
            self._folder.write_outcome(Outcome(status="interrupted", error=error, exit_status=75, steps=steps))
            return True
        self._too_few_since = None
        if len(self._ready) != self._nodes.max and now - self._ready_changed < SETTLE_SECONDS:
            return False
        self._platform = self._platform or self._reports[next(iter(chosen))].platform
        self._order = Instruction(
            beat=self._order.beat, generation=uuid.uuid4().hex, members=chosen, leader=next(iter(chosen))
        )
        self._formed = now
        ranks = ", ".join(f"{count} on {node}" for node, count in chosen.items())
        self._folder.write_event(Event(note=f"{counted(sum(chosen.values()), 'rank')}: {ranks}", waiting=STARTING))
        return False

    def _could_grow(self) -> bool:
        settled = time.monotonic() - max(self._ready_changed, self._formed) > SETTLE_SECONDS and bool(self._passed_on)
        return settled and sum(self._plan().values()) > sum(self._order.members.values())

    def _plan(self) -> dict[str, int]:
        slots = {node: report.slots for node, report in self._candidates().items()}
        return plan(slots, lanes=self._job.config.lanes, ranks=self._job.world_size, most_nodes=self._nodes.max)

    def _candidates(self) -> dict[str, NodeReport]:
        """Returns the reports of nodes that can join: alive, not leaving, and of the same platform and code.

        Between generations, a node first has to end the last one's ranks, and to look at the code that new ones load.
        """
        found: dict[str, NodeReport] = {}
        for node, report in self._reports.items():
            if report.leaving or self._heartbeats[node].silence > STALE_SECONDS or node in self._unfit:
                continue
            if report.generation and not self._order.members:
                continue
            platform = self._platform or next(iter(found.values()), report).platform
            code = {"code_digest": self._job.code_digest, "network_files": self._job.network_files}
            wanted = platform.model_copy(update=code)
            differing = differences(wanted.model_dump(), report.platform.model_dump())
            if not differing:
                found[node] = report
            elif node not in self._refused:
                self._refused.add(node)
                reason = f"its weights would differ: {'; '.join(differing)}"
                self._folder.write_event(Event(warning=f"node {node} is not used, since {reason}"))
        return found

    def _members(self) -> dict[str, NodeReport]:
        """Returns the reports about this generation, of those members that have sent one."""
        return {
            node: report
            for node in self._order.members
            if (report := self._reports.get(node)) and report.generation == self._order.generation
        }

    @property
    def _paused_for(self) -> float:
        return time.monotonic() - self._paused if self._paused else 0.0
