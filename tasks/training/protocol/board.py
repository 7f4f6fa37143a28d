"""The messages between coordinator and agents: small objects in the bucket.

nodes/invitations/<run>            an `Invitation`: nodes may join this training
runs/<run>/nodes/order             an `Instruction` of the coordinator, written again at each beat
runs/<run>/nodes/report/<node>     a `NodeReport` of an agent, written again at each beat

A reader treats the writer as alive while its object keeps changing, by the reader's own clock; no two machines' clocks
are compared.
"""

import time
from collections.abc import Iterator

from pydantic import Field

from infra.records import Record
from infra.storage import bucket_layout
from infra.storage.object_store import ObjectStore
from tasks.training.platform import Platform
from tasks.training.protocol.job import Event, Job, Outcome

BEAT = 1.0  # seconds between two rounds of reading and writing the board
STORAGE_TIMEOUT = 5.0  # seconds until a request fails; a process that waits for one cannot beat

CONNECTION_LOST = "the connection to another node was lost"
"""`NodeReport.trouble` of a node that has not failed by itself."""


class _Message(Record, extra="forbid"):
    """A message. One with unknown fields, from another version of Convoy, is refused rather than read in part."""


class Invitation(_Message):
    """A training that looks for nodes."""

    job: Job


class Instruction(_Message):
    """The coordinator's order to all nodes."""

    beat: int
    generation: str = ""
    """Id of the generation; empty while there is none."""

    members: dict[str, int] = Field(default_factory=dict)
    """Number of ranks per node of this generation."""

    leader: str = ""
    """The member that hosts the rendezvous of torchrun's agents."""

    pause: bool = False
    """The ranks must store a checkpoint and end, before the next generation or the end of the training."""


class NodeReport(_Message):
    """The state of a node."""

    beat: int
    slots: int
    """Ranks that the node can run."""

    platform: Platform
    """Platform of the node; only equal platforms give equal weights."""

    generation: str = ""
    """Id of the generation that the fields below belong to."""

    meeting: str = ""
    """Rendezvous of torchrun's agents, as `address:port`; set by the leader only."""

    exit_status: int | None = None
    """Exit status of torchrun; None before it starts and while it runs."""

    outcome: Outcome | None = None
    """Outcome of the ranks, once they have ended."""

    trouble: str = ""
    """Why ranks ended without success, in one line."""

    events: tuple[Event, ...] = ()
    """The latest events of the node's ranks."""

    events_before: int = 0
    """Number of earlier events in this generation."""

    leaving: bool = False
    """The node has ended its ranks, and sends no further report."""


class Board:
    """The messages of one training. Every method raises ServiceError when the storage fails."""

    def __init__(self, store: ObjectStore, run_id: str) -> None:
        self._store, self.run_id = store, run_id

    def invite(self, invitation: Invitation) -> None:
        """Publishes the invitation that agents look for."""
        self._store.put_bytes(bucket_layout.invitation(self.run_id), invitation.model_dump_json().encode())

    def invitation(self) -> Invitation | None:
        """Returns the training's invitation; None if it has been withdrawn."""
        return self._store.read_record(bucket_layout.invitation(self.run_id), Invitation)

    def write_order(self, order: Instruction) -> None:
        self._store.put_bytes(bucket_layout.node_order(self.run_id), order.model_dump_json().encode())

    def order(self) -> Instruction | None:
        return self._store.read_record(bucket_layout.node_order(self.run_id), Instruction)

    def write_report(self, node: str, report: NodeReport) -> None:
        self._store.put_bytes(bucket_layout.node_report(self.run_id, node), report.model_dump_json().encode())

    def report(self, node: str) -> NodeReport | None:
        return self._store.read_record(bucket_layout.node_report(self.run_id, node), NodeReport)

    def reports(self) -> dict[str, NodeReport]:
        """Returns the last report of every node that has joined, sorted by node name."""
        prefix = bucket_layout.node_reports(self.run_id)
        nodes = [info.key.removeprefix(prefix) for info in self._store.list(prefix)]
        return {node: report for node in nodes if (report := self.report(node))}

    def clear(self) -> None:
        """Withdraws the invitation and deletes all messages."""
        self._store.delete(bucket_layout.invitation(self.run_id))
        for info in list(self._store.list(bucket_layout.nodes(self.run_id))):
            self._store.delete(info.key)


def invited_runs(store: ObjectStore) -> Iterator[str]:
    """Yields the ids of the runs that nodes may join."""
    for info in store.list(bucket_layout.INVITATIONS):
        yield info.key.removeprefix(bucket_layout.INVITATIONS)


class Heartbeat:
    """Measures how long another process has been silent, by this machine's clock."""

    def __init__(self) -> None:
        self._beat: int | None = None
        self._seen = time.monotonic()

    def beat(self, beat: int) -> None:
        """Records the newest beat that was read."""
        if beat != self._beat:
            self._beat, self._seen = beat, time.monotonic()

    def reset(self) -> None:
        """Starts to measure again from now, after this machine could not reach the storage."""
        self._seen = time.monotonic()

    @property
    def silence(self) -> float:
        """Seconds since the last new beat."""
        return time.monotonic() - self._seen
