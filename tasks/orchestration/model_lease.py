"""Lets one training of a model run at a time, by a lease in Prefect, which ends by itself if its holder dies.

The slot that a lease takes is in Prefect's database, the lease itself where the server's setting
`PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE` says: by default in its memory. A server that was restarted has then
forgotten the lease and keeps the slot for ever. So a flow run that holds a lease bears a label that says so; and a
slot that is taken for longer than a lease lasts, while no unfinished flow run bears that label, is freed.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta

import httpx
from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import ConcurrencyLeaseHolder, StateType
from prefect.client.schemas.responses import GlobalConcurrencyLimitResponse
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from infra.machine import stopping
from infra.tracking.tags import HELD_LEASE
from tasks.orchestration.cancellation import stop_if_cancelled
from tasks.orchestration.flow_runs import PAGE, flow_run_id, label_flow_run, settle_killed_flow_runs, training_flow_runs
from tasks.orchestration.progress import run_logger

LEASE = 60.0  # seconds after which the lease of a holder that died is free: the least that Prefect takes
PATIENCE = 5.0  # seconds to try for a lease that seems to be free
LOOK_EVERY = 2.0  # seconds between looks whether it is
FORGOTTEN = timedelta(seconds=LEASE + 45)
"""A slot that is taken for longer without a holder: LEASE, and three rounds of the service that ends leases."""

LIMITS = "convoy-model-"  # names of limits begin so
UNFINISHED = [StateType.RUNNING, StateType.PENDING, StateType.PAUSED, StateType.CANCELLING]


def limit_of(name: str) -> str:
    """Returns the name of the limit in Prefect that is a model's lease."""
    return LIMITS + re.sub(r"[^A-Za-z0-9_-]+", "-", name)


@contextmanager
def model_lease(name: str) -> Iterator[None]:
    """Holds the lease of a model; of several flow runs that wait for it, any may be the next.

    Raises:
        Cancelled: the flow run was cancelled while it waited.
        Stopped: a signal asked this process to end.
    """
    limit = limit_of(name)
    # Before one of them is taken for a holder; and what it held need not be waited for.
    if any(killed.labels.get(HELD_LEASE) == limit for killed in settle_killed_flow_runs()):
        free_forgotten(limit, after=timedelta(0))
    told = False
    with ExitStack() as held:
        while not _take(limit, held):
            stop_if_cancelled()
            if not told:
                run_logger().info("another run trains model %s: waiting for it to end", name)
                told = True
            stopping.wait(LOOK_EVERY)
        yield


def forgotten_leases() -> list[str]:
    """Returns the names of limits whose slot is taken although no flow run holds a lease of it."""
    with get_client(sync_client=True) as client:
        limits: list[GlobalConcurrencyLimitResponse] = []
        while page := client.read_global_concurrency_limits(limit=PAGE, offset=len(limits)):
            limits += page
        return [limit.name for limit in limits if limit.name.startswith(LIMITS) and _is_forgotten(client, limit)]


def free_forgotten(name: str, after: timedelta | None = None) -> bool:
    """Frees the slot of a limit if no flow run holds it; says whether it did.

    Args:
        after: how long it must have been taken; None takes `FORGOTTEN`.
    """
    with get_client(sync_client=True) as client:
        try:
            limit = client.read_global_concurrency_limit_by_name(name)
        except ObjectNotFound:
            return False
        return _is_forgotten(client, limit, after) and _free(client, limit)


def _take(limit: str, held: ExitStack) -> bool:
    """Tries for the lease if it seems to be free (Prefect logs an error for each try in vain)."""
    with get_client(sync_client=True) as client:
        with suppress(ObjectAlreadyExists):  # another flow run may be as fast
            client.upsert_global_concurrency_limit_by_name(limit, 1)
        try:
            found = client.read_global_concurrency_limit_by_name(limit)
        except ObjectNotFound:  # another flow run is freeing it
            return False
        if found.active_slots >= found.limit:
            if _is_forgotten(client, found) and _free(client, found):
                run_logger().warning(
                    "the lease %s was taken but had no holder, so it was freed: Prefect forgets leases at a restart; "
                    "to prevent that, set PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE for its server, as the README says",
                    limit,
                )
            return False
        try:
            held.enter_context(
                concurrency(
                    limit,
                    lease_duration=LEASE,
                    timeout_seconds=PATIENCE,
                    strict=True,
                    holder=_holder(),
                    raise_on_lease_renewal_failure=False,  # an outage of Prefect shall not end a training under way
                )
            )
        except (TimeoutError, ConcurrencySlotAcquisitionError):  # another flow run was faster
            return False
    label_flow_run({HELD_LEASE: limit})
    held.callback(_unlabel)
    return True


def _unlabel() -> None:
    with suppress(httpx.HTTPError):  # the label of a flow run that has ended counts for nothing
        label_flow_run({HELD_LEASE: ""})


def _holder() -> ConcurrencyLeaseHolder | None:
    flow = flow_run_id()
    return ConcurrencyLeaseHolder(type="flow_run", id=flow) if flow else None


def _is_forgotten(
    client: SyncPrefectClient, limit: GlobalConcurrencyLimitResponse, after: timedelta | None = None
) -> bool:
    """Returns whether a slot without a holder is taken for longer than a lease lasts (renewing does not touch it)."""
    taken = limit.active_slots >= limit.limit
    after = FORGOTTEN if after is None else after
    long_ago = not after or (limit.updated is not None and datetime.now(UTC) - limit.updated > after)
    return (
        taken
        and long_ago
        and not any(run.labels.get(HELD_LEASE) == limit.name for run in training_flow_runs(client, UNFINISHED))
    )


def _free(client: SyncPrefectClient, limit: GlobalConcurrencyLimitResponse) -> bool:
    """Deletes a limit, which the next flow run makes anew; says whether this process did so.

    By its id, so that of two that find it forgotten the slower one does not delete the limit that the faster one made.
    """
    try:
        client.delete_global_concurrency_limit_by_name(str(limit.id))
    except ObjectNotFound:
        return False
    return True
