"""Decides which nodes train together, and what happens when one is lost, comes or goes."""

import time
import uuid
from collections.abc import Callable, Mapping

from infra.errors import ServiceError
from infra.storage.object_store import open_bucket
from tasks.training.nodes.plan import plan
from tasks.training.platform import Platform, differences, this_platform
from tasks.training.protocol.board import ANSWERS_WITHIN, BEAT, Board, Heartbeat, Instruction, Invitation, NodeReport
from tasks.training.protocol.job import Event, JobFolder, Outcome, Restarts, Status
from tasks.training.protocol.patience import PAUSE

SETTLE = 5.0  # seconds without a change among the nodes before a generation is formed, or grows
FRESH = 4 * BEAT  # seconds of silence after which a node is not begun with


class Coordinator:
    """Brings one training to its end, over as many generations of nodes as it takes.

    Args:
        folder: of the job, on this machine; the ranks' events and their outcome are passed on to it.
    """

    def __init__(self, folder: JobFolder) -> None:
        self._folder, self._job = folder, folder.read_job()
        self._nodes = self._job.launch.nodes
        store = open_bucket(timeout=ANSWERS_WITHIN)
        self._board = Board(store, self._job.run_id)
        self._order = Instruction(beat=0)
        self._reports: dict[str, NodeReport] = {}
        self._heartbeats: dict[str, Heartbeat] = {}
        # Schedulers choose other machines, and one that only coordinates may have another kind of processor: then the
        # first node decides.
        here = self._job.launch.launcher == "nodes" and self._nodes.here
        self._platform: Platform | None = this_platform() if here else None
        self._refused: set[str] = set()
        self._passed_on: dict[str, int] = {}  # events of each member of this generation
        self._ready: frozenset[str] = frozenset()
        self._changed = time.monotonic()  # when those who are ready did
        self._short_since: float | None = time.monotonic()
        self._formed = 0.0
        self._paused: float | None = None
        self._restarts = Restarts(folder)

    def run(self, wants_end: Callable[[], bool]) -> None:
        """Coordinate until the training is over; how it ended is then in the folder, if the ranks said so.

        Args:
            wants_end: whether the task has ended, or wants this to.
        """
        try:
            self._board.clear()
            self._board.invite(Invitation(job=self._job))
            while not self._beat(ending=wants_end()):
                time.sleep(BEAT)
        finally:
            try:
                self._board.clear()
            except ServiceError:
                pass  # the agents find that this has fallen silent

    def _beat(self, *, ending: bool) -> bool:
        """Look around once and give orders; whether the training is over."""
        if ending and self._paused is None:
            self._paused = time.monotonic()
        try:
            self._listen()
            over = self._watch(ending=ending) if self._order.members else ending or self._gather()
            self._order = self._order.model_copy(
                update={"beat": self._order.beat + 1, "pause": self._paused is not None}
            )
            self._board.write_order(self._order)
            return over
        except ServiceError:
            # The ranks go on meanwhile, and nobody is to blame for a silence in which we could not hear.
            for heartbeat in self._heartbeats.values():
                heartbeat.reset()
            return ending and self._paused_for > PAUSE

    def _listen(self) -> None:
        self._reports = self._board.reports()
        for node, report in self._reports.items():
            self._heartbeats.setdefault(node, Heartbeat()).beat(report.beat)
        for node, report in self._members().items():
            for event in report.events[max(0, self._passed_on.get(node, 0) - report.events_before) :]:
                self._folder.write_event(event)
            self._passed_on[node] = report.events_before + len(report.events)
        ready = frozenset(self._candidates())
        if ready != self._ready:
            self._ready, self._changed = ready, time.monotonic()

    def _watch(self, *, ending: bool) -> bool:
        """See after the generation that trains; whether the training is over."""
        members = self._members()
        ended = {node: report for node, report in members.items() if report.exit_status is not None}
        outcomes = {report.outcome.status: report.outcome for report in ended.values() if report.outcome}
        all_ended = len(ended) == len(self._order.members)
        patience = self._nodes.patience
        lost = [node for node in self._order.members if node not in self._heartbeats or self._silence(node) > patience]
        # During a pause, a checkpoint that could not be stored is only lost: the next generation repeats its steps.
        final: list[Status] = ["finished", "failed"]
        if self._paused is None:
            final.append("unsaved")
        if said := next((outcomes[status] for status in final if status in outcomes), None):
            self._folder.write_outcome(said)
            return True
        if self._paused is None and ("interrupted" in outcomes or any(report.leaving for report in members.values())):
            self._paused = time.monotonic()  # a node leaves; the others may not know yet
        if self._paused is not None:
            if not (all_ended or self._paused_for > PAUSE or lost):
                return False
            if ending and "interrupted" in outcomes:
                self._folder.write_outcome(outcomes["interrupted"])
            self._dissolve()
            return ending
        if lost:
            return self._again(f"node {', '.join(lost)} has been silent for {patience:g} s", outcomes)
        if troubles := [f"{report.trouble} on node {node}" for node, report in ended.items() if report.exit_status]:
            return self._again(troubles[0], outcomes)
        if all_ended:
            return self._again("the ranks ended without a word", outcomes)
        if self._could_grow():
            self._note("more nodes are ready: storing a checkpoint, to go on with them")
            self._paused = time.monotonic()
        return False

    def _again(self, reason: str, outcomes: Mapping[Status, Outcome]) -> bool:
        """Have another generation go on from the last checkpoint, unless this has led nowhere too often."""
        if not self._restarts.take():
            last = Outcome(status="crashed", error=reason, exit_status=1)
            self._folder.write_outcome(outcomes.get("crashed", last))
            return True
        self._folder.write_event(Event(warning=f"{reason}; going on from the last checkpoint"))
        self._dissolve()
        self._changed = time.monotonic()  # it may be a while until a dead node's silence tells
        return False

    def _dissolve(self) -> None:
        self._order = Instruction(beat=self._order.beat)
        self._paused = None
        self._passed_on.clear()
        self._short_since = None

    def _gather(self) -> bool:
        """Form a generation as soon as there are nodes for it; whether waiting for them has ended the training."""
        now = time.monotonic()
        chosen = self._plan()
        if len(self._ready) < self._nodes.min or not chosen:
            self._short_since = self._short_since or now
            if now - self._short_since < self._nodes.wait:
                return False
            error = f"only {len(self._ready)} nodes for {self._nodes.wait:g} s, fewer than nodes.min {self._nodes.min}"
            self._folder.write_outcome(
                Outcome(status="interrupted", error=error, exit_status=75, steps=self._folder.last_step())
            )
            return True
        self._short_since = None
        if len(self._ready) != self._nodes.max and now - self._changed < SETTLE:
            return False
        self._platform = self._platform or self._reports[next(iter(chosen))].platform
        self._order = Instruction(
            beat=self._order.beat, generation=uuid.uuid4().hex, members=chosen, leader=next(iter(chosen))
        )
        self._formed = now
        ranks = ", ".join(f"{count} on {node}" for node, count in chosen.items())
        self._note(f"{sum(chosen.values())} ranks: {ranks}")
        return False

    def _could_grow(self) -> bool:
        settled = time.monotonic() - max(self._changed, self._formed) > SETTLE and bool(self._passed_on)
        return settled and sum(self._plan().values()) > sum(self._order.members.values())

    def _plan(self) -> dict[str, int]:
        slots = {node: report.slots for node, report in self._candidates().items()}
        return plan(slots, lanes=self._job.config.lanes, ranks=self._job.world_size, most_nodes=self._nodes.max)

    def _candidates(self) -> dict[str, NodeReport]:
        """Nodes to begin with: alive, here to stay, and sure to compute the same bits as the others."""
        found: dict[str, NodeReport] = {}
        for node, report in self._reports.items():
            if report.leaving or self._silence(node) > FRESH:
                continue
            wanted = self._platform or next(iter(found.values()), report).platform
            differing = differences(wanted.model_dump(), report.platform.model_dump())
            if not differing:
                found[node] = report
            elif node not in self._refused:
                self._refused.add(node)
                reason = f"its weights would differ: {'; '.join(differing)}"
                self._folder.write_event(Event(warning=f"node {node} is not used, since {reason}"))
        return found

    def _members(self) -> dict[str, NodeReport]:
        """What the members of this generation say of it, as far as they do."""
        return {
            node: report
            for node in self._order.members
            if (report := self._reports.get(node)) and report.generation == self._order.generation
        }

    def _silence(self, node: str) -> float:
        return self._heartbeats[node].silence

    @property
    def _paused_for(self) -> float:
        return time.monotonic() - self._paused if self._paused else 0.0

    def _note(self, text: str) -> None:
        self._folder.write_event(Event(note=text))
