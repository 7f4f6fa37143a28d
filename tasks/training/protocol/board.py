"""What coordinator and agents tell each other, as small objects in the bucket.

nodes/invitations/<run>            there is a training that nodes may join: an `Invitation`
runs/<run>/nodes/order             what the coordinator wants: an `Instruction`, written anew at each beat
runs/<run>/nodes/report/<node>     how an agent does: a `NodeReport`, likewise

A writer is alive while its object keeps changing, by the reader's own clock; no two clocks are compared.
"""

import time
from collections.abc import Iterator
from typing import TypeVar

from pydantic import Field, ValidationError

from infra.records import Record
from infra.storage import bucket_layout
from infra.storage.object_store import ObjectStore
from infra.storage.s3_client import ObjectMissing
from tasks.training.platform import Platform
from tasks.training.protocol.job import Event, Job, Outcome

BEAT = 1.0  # seconds between two looks at the board
ANSWERS_WITHIN = 5.0  # seconds that the storage has for an answer: whoever waits for it is silent


class _Message(Record, extra="forbid"):
    """What an agent of another version wrote is refused rather than half understood."""


Message = TypeVar("Message", bound=_Message)


class Invitation(_Message):
    """A training that looks for nodes."""

    job: Job


class Instruction(_Message):
    """What is to be done."""

    beat: int
    generation: str = ""
    """Its id; empty while there is none."""

    members: dict[str, int] = Field(default_factory=dict)
    """Ranks of each node of this generation."""

    leader: str = ""
    """The member where torchrun's agents meet."""

    pause: bool = False
    """The ranks are to store a checkpoint and end: another generation follows, or none."""


class NodeReport(_Message):
    """How a node does."""

    beat: int
    slots: int
    """Ranks that it can run."""

    platform: Platform
    """Its own; only equal ones give equal weights."""

    generation: str = ""
    """The one that the rest is about."""

    meeting: str = ""
    """Of the leader: address and port where torchrun's agents meet."""

    exit_status: int | None = None
    """Of its torchrun; None while that runs, or before."""

    outcome: Outcome | None = None
    """What its ranks left, once they have ended."""

    trouble: str = ""
    """What torchrun said of ranks that left no outcome."""

    events: tuple[Event, ...] = ()
    """The last ones of its ranks."""

    events_before: int = 0
    """How many of this generation came before those."""

    leaving: bool = False
    """It has ended its ranks, and is gone after this."""


class Board:
    """The objects of one training.

    Every method raises ServiceError when the storage fails.
    """

    def __init__(self, store: ObjectStore, run_id: str) -> None:
        self._store, self.run_id = store, run_id

    def invite(self, invitation: Invitation) -> None:
        """Let nodes know of the training."""
        self._store.put_bytes(bucket_layout.invitation(self.run_id), invitation.model_dump_json().encode())

    def invitation(self) -> Invitation | None:
        """The training's invitation, if it is still open."""
        return self._read(bucket_layout.invitation(self.run_id), Invitation)

    def write_order(self, order: Instruction) -> None:
        self._store.put_bytes(bucket_layout.node_order(self.run_id), order.model_dump_json().encode())

    def order(self) -> Instruction | None:
        return self._read(bucket_layout.node_order(self.run_id), Instruction)

    def write_report(self, node: str, report: NodeReport) -> None:
        self._store.put_bytes(bucket_layout.node_report(self.run_id, node), report.model_dump_json().encode())

    def report(self, node: str) -> NodeReport | None:
        return self._read(bucket_layout.node_report(self.run_id, node), NodeReport)

    def reports(self) -> dict[str, NodeReport]:
        """The last report of every node that has ever joined, in the order of their names."""
        prefix = bucket_layout.node_reports(self.run_id)
        nodes = [info.key.removeprefix(prefix) for info in self._store.list(prefix)]
        return {node: report for node in nodes if (report := self.report(node))}

    def clear(self) -> None:
        """Take the invitation back, and remove what was said."""
        self._store.delete(bucket_layout.invitation(self.run_id))
        for info in list(self._store.list(bucket_layout.nodes(self.run_id))):
            self._store.delete(info.key)

    def _read(self, key: str, kind: type[Message]) -> Message | None:
        try:
            return kind.model_validate_json(self._store.get_bytes(key))
        except (ObjectMissing, ValidationError):  # another version of Convoy may have written it
            return None


def invited(store: ObjectStore) -> Iterator[str]:
    """Ids of the runs that look for nodes."""
    for info in store.list(bucket_layout.INVITATIONS):
        yield info.key.removeprefix(bucket_layout.INVITATIONS)


class Heartbeat:
    """Tells from the beats of another process how long it has been silent, by this machine's clock."""

    def __init__(self) -> None:
        self._beat: int | None = None
        self._seen = time.monotonic()

    def beat(self, beat: int) -> None:
        """Takes note of the newest beat that was read."""
        if beat != self._beat:
            self._beat, self._seen = beat, time.monotonic()

    def reset(self) -> None:
        """Counts the silence from now: this machine's way to the storage was cut."""
        self._seen = time.monotonic()

    @property
    def silence(self) -> float:
        """Seconds since the last new beat."""
        return time.monotonic() - self._seen
