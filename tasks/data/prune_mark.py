"""Keeps trainings from relying on data that `convoy prune` is about to delete.

pruning/<random>        there while a prune is at work; written anew every `RENEWED` seconds

A prune puts its mark and then asks Prefect which trainings are under way. A training's flow run is in Prefect before
it looks for marks, which it does before it looks for data. So whichever comes second sees the other: the prune leaves
data alone, or the training waits, and finds afterwards what is left. Both may be on different machines; they need the
same bucket and the same Prefect.
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

RENEWED = 20.0  # seconds
SILENCE = 300.0  # seconds without a renewal after which its prune counts as killed
ASK_EVERY = 1.0  # seconds


@contextmanager
def marked(store: ObjectStore) -> Iterator[Callable[[], None]]:
    """Shows, while the block runs, that this process prunes; yields a function to be called before data are deleted.

    Raises:
        ServiceError: the object store failed; from the function: the mark is gone, since it was not renewed in time.
    """
    key, ended = bucket_layout.prune_mark(uuid4().hex), threading.Event()

    def check() -> None:
        if store.head(key) is None:
            raise ServiceError(
                "this prune could not renew its mark in time, so trainings no longer wait for it; start it again"
            )

    def renew() -> None:
        while not ended.wait(RENEWED):
            with suppress(ServiceError):  # `check` finds out
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
        with suppress(ServiceError):  # trainings see that it is silent
            store.delete(key)


def wait_for_prune(store: ObjectStore) -> None:
    """Returns once no prune is at work; removes the mark of one that was killed.

    Raises:
        Cancelled: the flow run was cancelled meanwhile.
        ServiceError: the object store failed.
    """
    last: dict[str, str] = {}
    since = time.monotonic()
    while marks := {info.key: info.etag for info in store.list(bucket_layout.PRUNING)}:
        if not last:
            run_logger().info("`convoy prune` is deleting data: waiting for it to end")
        if marks != last:
            last, since = marks, time.monotonic()
        elif time.monotonic() - since > SILENCE:
            for key in marks:
                store.delete(key)
        stop_if_cancelled()
        stopping.wait(ASK_EVERY)
