"""How long each process waits at a stop, in one place: each must outlast those that it waits for.

A stop goes down from the flow to the ranks, which agree on a step and end. Rank 0 waits for the storage to take the
last checkpoint; all the others wait for ranks. All figures are in seconds.
"""

AT_LEAST, AT_MOST = 15.0, 60.0  # for the last checkpoint
ASSUMED_SPEED = 10e6  # bytes/s of an upload, before one was measured

FLUSH = 10.0  # for the tracking server to take the last metrics; checkpoints carry the others
REACH_STOP = 20.0  # from SIGTERM to the agreed step; then a rank ends itself: it may wait for one that is gone
SLACK = 5.0  # that a stopped rank lives longer than last checkpoint and last metrics take
TORCHRUN = REACH_STOP + AT_MOST + FLUSH + SLACK  # then kills its ranks
OWNER = TORCHRUN + 5.0  # supervisor or agent: then kills torchrun and ranks
HUNG = REACH_STOP + SLACK  # supervisor: then kills ranks that are not at the stop, and should have ended themselves
PAUSE = OWNER + 5.0  # coordinator: then goes on without the nodes that have not stopped
FLOW = PAUSE + 5.0  # then kills the supervisor
CONTAINER = 120.0  # at least, that a container engine gives a pod or service between SIGTERM and SIGKILL


def last_checkpoint(size: int, speed: float | None) -> float:
    """Returns how long the storage may take for the checkpoint of a stop, in seconds.

    Args:
        size: bytes of the state.
        speed: bytes/s of the last upload, None if there was none.
    """
    return min(AT_LEAST + 2 * size / (speed or ASSUMED_SPEED), AT_MOST)
