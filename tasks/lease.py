"""One training of a model at a time: a lease in Prefect, which ends by itself if its holder dies."""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from prefect import get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists

from tasks.cancel import stop_if_cancelled
from tasks.progress import run_logger

LEASE = 60.0  # seconds after which the lease of a holder that died is free: the least that Prefect takes
PATIENCE = 5.0  # seconds between looks whether the waiting run was cancelled


def limit_of(name: str) -> str:
    """Name of the limit in Prefect that is a model's lease."""
    return "convoy-model-" + re.sub(r"[^A-Za-z0-9_-]+", "-", name)


@contextmanager
def model_lease(name: str) -> Iterator[None]:
    """Hold the lease of a model; whoever comes second waits, however long, in no certain order.

    Raises:
        Cancelled: the flow run was cancelled while it waited.
    """
    limit = limit_of(name)
    with get_client(sync_client=True) as client, suppress(ObjectAlreadyExists):  # another run may be as fast
        client.upsert_global_concurrency_limit_by_name(limit, 1)
    told = False
    with ExitStack() as stack:
        while True:
            # An outage of Prefect shall not end a training that is under way.
            lease = concurrency(
                limit, lease_duration=LEASE, timeout_seconds=PATIENCE, strict=True, raise_on_lease_renewal_failure=False
            )
            try:
                stack.enter_context(lease)
                break
            except TimeoutError:
                stop_if_cancelled()
                if not told:
                    run_logger().info("another run trains model %s: waiting for it to end", name)
                    told = True
        yield
