"""Prevents trainings from using data that `convoy prune` is about to delete.

pruning/<random>        exists while a prune runs, which rewrites it every `RENEWAL_SECONDS`

A prune writes its mark, then asks Prefect for running trainings. A training's flow run is known to Prefect before the
training checks for marks, and it checks for marks before it looks up data. So the second of the two sees the first: the
prune keeps all data, or the training waits and then finds the remaining data. Both may run on different machines; they
need the same bucket and the same Prefect.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from uuid import uuid4

from infra.errors import ServiceError
from infra.machine import stopping
from infra.storage import bucket_layout
from infra.storage.object_store import ObjectStore
from tasks.orchestration.cancellation import stop_if_cancelled
from tasks.orchestration.progress import run_logger

RENEWAL_SECONDS = 20.0
MAX_SILENCE_SECONDS = 300.0  # without a renewal, after which the prune counts as killed
POLL_SECONDS = 1.0


@contextmanager
def marked(store: ObjectStore) -> Iterator[Callable[[], None]]:
    """Keeps a mark in the bucket while the block runs; yields a check to be called before data are deleted.

    Raises:
        ServiceError: the object store failed; from the check: the mark is gone, since it was not renewed in time.
    """
    key, ended = bucket_layout.prune_mark(uuid4().hex), threading.Event()

    def check() -> None:
        if store.head(key) is None:
            raise ServiceError(
                "this prune could not renew its mark in time, so trainings no longer wait for it; start it again"
            )

    def renew() -> None:
        while not ended.wait(RENEWAL_SECONDS):
            with suppress(ServiceError):  # `check` notices a lost mark
                check()
                store.put_bytes(key, uuid4().bytes)

    store.put_bytes(key, uuid4().bytes)
    thread = threading.Thread(target=renew, name="prune-mark", daemon=True)
    thread.start()
    try:
        yield check
    finally:
        ended.set()
        thread.join()
        with suppress(ServiceError):  # trainings notice that it is no longer renewed
            store.delete(key)


def wait_for_prune(store: ObjectStore) -> None:
    """Waits until no prune runs; removes marks of killed prunes.

    Raises:
        Cancelled: the flow run was cancelled while it waited.
        ServiceError: the object store failed.
    """
    last: dict[str, str] = {}
    since = time.monotonic()
    while marks := {info.key: info.etag for info in store.list(bucket_layout.PRUNING)}:
        if not last:
            run_logger().info("`convoy prune` is deleting data: waiting for it to end")
        if marks != last:
            last, since = marks, time.monotonic()
        elif time.monotonic() - since > MAX_SILENCE_SECONDS:
            for key in marks:
                store.delete(key)
        stop_if_cancelled()
        stopping.wait(POLL_SECONDS)
