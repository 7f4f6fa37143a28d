"""Lets one training of a model run at a time, by a lease in Prefect that expires if its holder dies.

The slot of a lease is in Prefect's database. The lease itself is where the server's setting
`PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE` says: by default in memory. A server that restarts then loses the lease and
keeps the slot taken for ever. So a flow run that holds a lease has a label, and a slot is freed if it was taken for
longer than a lease lasts while no unfinished flow run has that label.
"""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from uuid import UUID

import httpx
from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import ConcurrencyLeaseHolder, FlowRun, StateType
from prefect.client.schemas.responses import GlobalConcurrencyLimitResponse
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from infra.machine import stopping
from infra.tracking.tags import ALIVE, HELD_LEASE
from tasks.orchestration.cancellation import stop_if_cancelled
from tasks.orchestration.flow_runs import (
    BEAT_SECONDS,
    PAGE,
    flow_run_id,
    is_alive_here,
    label_flow_run,
    settle_killed_flow_runs,
    training_flow_runs,
)
from tasks.orchestration.progress import run_logger
from tasks.orchestration.retries import outlast

LEASE_SECONDS = 60.0  # after which the lease of a dead holder expires: the least that Prefect accepts
ACQUIRE_SECONDS = 5.0  # timeout for acquiring a lease that seems to be free
POLL_SECONDS = 2.0  # between checks whether a lease is free
SILENT_POLLS = int(3 * BEAT_SECONDS / POLL_SECONDS)  # without a new sign of life, until a holder elsewhere is dead
FORGOTTEN_AFTER = timedelta(seconds=LEASE_SECONDS + 45)
"""Age from which a slot without a holder is freed: a lease, and three rounds of Prefect's service that ends leases."""

LIMIT_PREFIX = "convoy-model-"
UNFINISHED = [StateType.RUNNING, StateType.PENDING, StateType.PAUSED, StateType.CANCELLING]


class Signs:
    """The signs of life of a lease's holders, by which those that still run elsewhere are told apart from dead ones.

    Only flow runs of deployments give signs.
    """

    def __init__(self) -> None:
        self._last: dict[UUID, tuple[object, int]] = {}

    def seen(self, holder: FlowRun) -> bool:
        """Notes a holder's last sign; returns whether it goes on: here, or elsewhere with a new sign of late."""
        sign, (last, polls) = holder.labels.get(ALIVE), self._last.get(holder.id, (None, 0))
        polls = polls + 1 if sign == last else 0  # no time: Prefect may have been away
        self._last[holder.id] = sign, polls
        return is_alive_here(str(holder.id)) or (sign is not None and polls < SILENT_POLLS)


def limit_of(name: str) -> str:
    """Returns the name of the concurrency limit in Prefect that is a model's lease."""
    return LIMIT_PREFIX + re.sub(r"[^A-Za-z0-9_-]+", "-", name)


@contextmanager
def model_lease(name: str) -> Iterator[None]:
    """Holds the lease of a model while the block runs; waiting flow runs get it in any order.

    Raises:
        Cancelled: the flow run was cancelled while it waited.
        Stopped: a signal asked this process to end.
    """
    limit = limit_of(name)
    # First, since a killed flow run would count as a holder; there is no need to wait for its lease to expire.
    if any(killed.labels.get(HELD_LEASE) == limit for killed in outlast(settle_killed_flow_runs)):
        outlast(partial(free_forgotten, limit, after=timedelta(0)))
    logged, signs = False, Signs()
    with ExitStack() as held:
        while not outlast(partial(_acquire, limit, held, signs)):
            stop_if_cancelled()
            if not logged:
                run_logger().info("another run trains model %s: waiting for it to end", name)
                logged = True
            stopping.wait(POLL_SECONDS)
        try:
            yield
        except BaseException:
            with suppress(httpx.HTTPError):  # the label of a flow run that ends has no effect
                label_flow_run({HELD_LEASE: ""})
            raise
        outlast(partial(label_flow_run, {HELD_LEASE: ""}))  # a person's approval may follow, which takes days


def forgotten_leases() -> list[str]:
    """Returns the names of limits whose slot is taken although no flow run holds its lease."""
    with get_client(sync_client=True) as client:
        limits: list[GlobalConcurrencyLimitResponse] = []
        while page := client.read_global_concurrency_limits(limit=PAGE, offset=len(limits)):
            limits += page
        return [limit.name for limit in limits if limit.name.startswith(LIMIT_PREFIX) and _is_forgotten(client, limit)]


def free_forgotten(name: str, after: timedelta | None = None) -> bool:
    """Frees the slot of a limit if no flow run holds it; returns whether it did.

    Args:
        after: how long it must have been taken; None: `FORGOTTEN_AFTER`.
    """
    with get_client(sync_client=True) as client:
        try:
            limit = client.read_global_concurrency_limit_by_name(name)
        except ObjectNotFound:
            return False
        return _is_forgotten(client, limit, after) and _free(client, limit)


def _acquire(limit: str, held: ExitStack, signs: Signs) -> bool:
    """Tries to acquire the lease if it seems to be free (Prefect logs an error for each failed try)."""
    flow_run = flow_run_id()
    with get_client(sync_client=True) as client:
        with suppress(ObjectAlreadyExists):  # another flow run may create it at the same moment
            client.upsert_global_concurrency_limit_by_name(limit, 1)
        try:
            found = client.read_global_concurrency_limit_by_name(limit)
        except ObjectNotFound:  # another flow run is freeing it
            return False
        holders = _holders(client, limit)
        goes_on = [signs.seen(holder) for holder in holders if holder.id != flow_run]
        if found.active_slots >= found.limit:
            if not holders and _is_forgotten(client, found) and _free(client, found):
                run_logger().warning(
                    "the lease %s was taken but had no holder, so it was freed: Prefect forgets leases at a restart; "
                    "to prevent that, set PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE for its server, see infra/README.md",
                    limit,
                )
            return False
        if any(goes_on):
            return False  # Prefect has let its lease expire, as in an outage
        try:
            lease = concurrency(
                limit,
                lease_duration=LEASE_SECONDS,
                timeout_seconds=ACQUIRE_SECONDS,
                strict=True,
                holder=ConcurrencyLeaseHolder(type="flow_run", id=flow_run) if flow_run else None,
                raise_on_lease_renewal_failure=False,  # an outage of Prefect must not end a running training
            )
            lease.__enter__()
        except (TimeoutError, ConcurrencySlotAcquisitionError):  # another flow run was faster
            return False
    try:
        label_flow_run({HELD_LEASE: limit})
    except httpx.HTTPError:  # tried again as a whole: in an outage a lease may expire
        _release(lease)
        raise
    held.callback(_release, lease)
    return True


def _release(lease: AbstractContextManager[None]) -> None:
    with suppress(httpx.HTTPError):  # a lease that is not given back expires
        lease.__exit__(None, None, None)


def _is_forgotten(
    client: SyncPrefectClient, limit: GlobalConcurrencyLimitResponse, after: timedelta | None = None
) -> bool:
    """Returns whether a slot without a holder was taken long ago; renewing a lease does not change `limit.updated`."""
    after = FORGOTTEN_AFTER if after is None else after
    old = not after or (limit.updated is not None and datetime.now(UTC) - limit.updated > after)
    if limit.active_slots < limit.limit or not old:
        return False
    return not _holders(client, limit.name)


def _holders(client: SyncPrefectClient, limit: str) -> list[FlowRun]:
    """Returns the unfinished flow runs that say that they hold a lease."""
    return [run for run in training_flow_runs(client, UNFINISHED) if run.labels.get(HELD_LEASE) == limit]


def _free(client: SyncPrefectClient, limit: GlobalConcurrencyLimitResponse) -> bool:
    """Deletes a limit, which the next flow run creates again; returns whether this process deleted it.

    It deletes by id: of two processes that find the limit forgotten, the slower one must not delete a new limit.
    """
    try:
        client.delete_global_concurrency_limit_by_name(str(limit.id))
    except ObjectNotFound:
        return False
    return True
