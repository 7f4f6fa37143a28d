"""How many seconds each process waits at a stop: each must wait longer than the processes that it waits for.

A stop goes down from the flow to the ranks, which agree on a step and end. Rank 0 waits until the last checkpoint is
uploaded; all other processes wait for ranks.
"""

CHECKPOINT_MIN, CHECKPOINT_MAX = 15.0, 60.0  # for the upload of the last checkpoint
ASSUMED_SPEED = 10e6  # bytes/s of an upload, until one is measured

METRICS_WAIT = 10.0  # for the last metrics to reach the tracking server; checkpoints hold the others
STOP_STEP_WAIT = 20.0  # from SIGTERM to the agreed step; then a rank exits: it may wait for a dead one
SLACK = 5.0  # that a stopped rank lives longer than the two uploads may take
TORCHRUN_WAIT = STOP_STEP_WAIT + CHECKPOINT_MAX + METRICS_WAIT + SLACK  # then torchrun kills its ranks
SUPERVISOR_WAIT = TORCHRUN_WAIT + 5.0  # then supervisor or agent kills torchrun and ranks
HUNG_RANKS_WAIT = STOP_STEP_WAIT + SLACK  # then the supervisor kills ranks that have not reached the agreed step
COORDINATOR_WAIT = SUPERVISOR_WAIT + 5.0  # then the coordinator goes on without the nodes that have not stopped
FLOW_WAIT = COORDINATOR_WAIT + 5.0  # then the flow kills the supervisor
WORKER_WAIT = FLOW_WAIT + 5.0  # then a worker kills its flow runs
CONTAINER_GRACE = 120.0  # minimum that a container engine must allow between SIGTERM and SIGKILL


def last_checkpoint(size: int, speed: float | None) -> float:
    """Returns how many seconds a stop's checkpoint of `size` bytes may take, by the last upload's speed in bytes/s."""
    return min(CHECKPOINT_MIN + 2 * size / (speed or ASSUMED_SPEED), CHECKPOINT_MAX)
