"""Checkpoints and final weights of a training in the bucket; each counts once its commit exists.

runs/<run>/checkpoints/step-00005064/state.safetensors
runs/<run>/checkpoints/step-00005064/commit.json          written last, by a conditional put
runs/<run>/weights/<SHA-256 of the weights>.safetensors   the final weights; model.safetensors in old runs
runs/<run>/weights/commit.json                            the outcome, written likewise

Only storing and loading tensors loads torch.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from safetensors import SafetensorError

from infra.errors import Outage, ServiceError, one_line
from infra.machine.files import file_digest
from infra.records import Record
from infra.storage import bucket_layout
from infra.storage.bucket_layout import COMMIT
from infra.storage.object_store import ObjectStore
from infra.storage.s3_client import ObjectMissing
from tasks.config.run import CheckpointConfig
from tasks.training.protocol.job import Job, Outcome, Status
from tasks.training.protocol.patience import last_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

STATE = "state.safetensors"
LONGEST_PAUSE = 30.0  # seconds between retries while the storage fails


class CheckpointFailed(RuntimeError):
    """No checkpoint can be stored, so that training on would risk too much work."""

    exit_status = 1
    status: Status = "failed"

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))  # a library's error may have several


class Unsaved(CheckpointFailed):
    """No checkpoint could be stored for `checkpoints.patience` seconds."""

    resumable = True
    status: Status = "unsaved"


class Commit(Record, extra="forbid"):
    """The commit of a whole checkpoint, with its digests and the values that are not in its tensors."""

    step: int
    manifest_digest: str
    """Digest of the training's `RunManifest`."""

    files: dict[str, str]
    """SHA-256 of each file, by its key."""

    val_accuracy: float | None = None
    """Validation accuracy, 0 to 1, of these weights; None if they were not validated."""

    train_seconds: float = 0.0
    """Seconds of training up to this step, summed over restarts."""

    rank_seconds: float = 0.0
    """Of each restart multiplied by its number of ranks."""

    metrics: tuple[dict[str, Any], ...] = ()
    """Rows (`MetricRow`) that the tracking server had not acknowledged."""

    committed: float
    """Seconds since 1970."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A state to store."""

    step: int
    state: "Mapping[str, Tensor]"
    """On the CPU; must not change any more."""

    val_accuracy: float | None
    train_seconds: float
    rank_seconds: float
    metrics: tuple[dict[str, Any], ...]


class CheckpointWriter:
    """Stores snapshots in a thread, so that training never waits for the storage.

    While one snapshot is uploaded, another may wait; a newer one replaces it. After a failure, the thread retries with
    the newest snapshot, until `config.patience` seconds have passed without a success.

    Args:
        folder: for temporary files on this machine.
        config: how often to store, how many checkpoints to keep, when to give up.
        on_trouble: receives a line when the storage begins to fail and when it works again.
        resumed: step of the checkpoint that the training resumed from; 0 if none.
    """

    def __init__(
        self,
        store: ObjectStore,
        job: Job,
        folder: Path,
        config: CheckpointConfig,
        on_trouble: Callable[[str], None],
        resumed: int = 0,
    ) -> None:
        self._store, self._job, self._folder, self._config, self._on_trouble = store, job, folder, config, on_trouble
        self._waiting: Snapshot | None = None
        self._busy = False
        self._closing = self._over = False
        self._failing_since: float | None = None
        self._failed: CheckpointFailed | None = None
        self.committed = self._saved = resumed  # steps of the last committed and the last queued snapshot
        self._size = 0  # bytes of a snapshot
        self._speed: float | None = None  # bytes/s of the last upload
        self._cannot_delete = False
        self._last = time.monotonic()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
        self._thread.start()

    def is_due(self) -> bool:
        """Returns whether `config.every` seconds have passed since the last snapshot."""
        return time.monotonic() - self._last >= self._config.every

    def save(self, snapshot: Snapshot) -> None:
        """Queues a snapshot for the thread.

        Raises:
            CheckpointFailed: the thread has given up.
        """
        with self._changed:
            if self._failed:
                raise self._failed
            self._last = time.monotonic()
            self._waiting, self._saved = snapshot, snapshot.step
            self._size = sum(tensor.nbytes for tensor in snapshot.state.values())
            self._changed.notify_all()

    @property
    def patience(self) -> float:
        """How many seconds `close` should wait at a stop, by the state's size and the last upload's speed."""
        return last_checkpoint(self._size, self._speed)

    def close(self, patience: float) -> bool:
        """Stores the waiting snapshot, for at most `patience` seconds, and ends the thread.

        Returns:
            Whether the newest snapshot is stored. If not, a resume goes on from `committed`.

        Raises:
            CheckpointFailed: the cause is not a slow or failing storage.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._failed or self.committed == self._saved, patience)
            if self._failed and not isinstance(self._failed, Unsaved):
                raise self._failed
            return self.committed == self._saved

    def end(self) -> None:
        """Ends the thread after the last step, when no snapshot is needed any more: one that waits is dropped.

        An upload that runs may end: otherwise its state would stay in the bucket without a commit, as one of an earlier
        start that was killed, which is deleted.
        """
        with self._changed:
            self._closing = self._over = True
            self._waiting = None
            self._changed.notify_all()
            over = self._changed.wait_for(lambda: not self._busy, self.patience)
        if over:
            self._try_to(self._delete_uncommitted)

    def _run(self) -> None:
        pause = 1.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._closing)
                snapshot, self._waiting = self._waiting, None
                if snapshot is None:
                    return
                self._busy = True
            try:
                self._commit(snapshot)
            except (ServiceError, OSError) as error:
                pause = self._put_back(snapshot, error, pause)
            except CheckpointFailed as error:
                with self._changed:
                    self._failed = error
            except Exception as error:  # a bug must not look like a slow upload
                with self._changed:
                    self._failed = CheckpointFailed(f"no checkpoint: {type(error).__name__}: {error}")
            else:
                pause = 1.0
                with self._changed:
                    self.committed = snapshot.step
                    self._changed.notify_all()
                if self._failing_since is not None:
                    self._on_trouble(f"checkpoints are stored again, at step {snapshot.step}")
                self._failing_since = None
                self._try_to(partial(self._prune, snapshot.step))
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                if self._failed:
                    return

    def _put_back(self, snapshot: Snapshot, error: ServiceError | OSError, pause: float) -> float:
        """Queues the snapshot again, unless a newer one waits, and pauses; returns the next pause in seconds."""
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
            self._on_trouble(f"the checkpoint of step {snapshot.step} cannot be stored yet; training goes on ({error})")
        with self._changed:
            if now - self._failing_since >= self._config.patience:
                patience = f"{self._config.patience:g} s (checkpoints.patience)"
                self._failed = Unsaved(f"no checkpoint could be stored for {patience}: {error}")
                return pause
            if not self._over:
                self._waiting = self._waiting or snapshot
            self._changed.wait_for(lambda: self._closing, min(pause, max(self._config.patience / 10, 0.1)))
            if self._closing:
                time.sleep(0.2)
        return min(2 * pause, LONGEST_PAUSE)

    def _commit(self, snapshot: Snapshot) -> None:
        from safetensors.torch import save_file

        prefix = bucket_layout.checkpoint(self._job.run_id, snapshot.step)
        file = self._folder / STATE
        try:
            save_file(dict(snapshot.state), file)
            files = {prefix + STATE: file_digest(file)}
            self._check_earlier(prefix, files)  # before its file is replaced
            began = time.monotonic()
            self._store.put_file(prefix + STATE, file)
            self._speed = file.stat().st_size / max(time.monotonic() - began, 1e-3)
        except SafetensorError as error:  # how it reports a full disk
            raise OSError(str(error)) from error
        finally:
            file.unlink(missing_ok=True)
        commit = Commit(
            step=snapshot.step,
            manifest_digest=self._job.manifest_digest,
            files=files,
            val_accuracy=snapshot.val_accuracy,
            train_seconds=snapshot.train_seconds,
            rank_seconds=snapshot.rank_seconds,
            metrics=snapshot.metrics,
            committed=time.time(),
        )
        if not self._store.put_if_absent(prefix + COMMIT, commit.model_dump_json().encode()):
            self._check_earlier(prefix, files)

    def _check_earlier(self, prefix: str, files: dict[str, str]) -> None:
        """Checks an earlier commit of the step: repeated after a resume, it must have the same state, bit by bit."""
        try:
            found = Commit.model_validate_json(self._store.get_bytes(prefix + COMMIT))
        except ObjectMissing:
            return
        except ValidationError:  # an unreadable commit does not count, and would block the new one
            self._store.delete(prefix + COMMIT)
            return
        if found.files != files:
            raise CheckpointFailed(f"another process trains run {self._job.run_id}: {prefix} differs; stop one of them")

    def _try_to(self, delete: Callable[[], None]) -> None:
        """Deletes old checkpoints; a failure is no reason to stop storing new ones."""
        try:
            delete()
        except Exception as error:
            if not self._cannot_delete:
                self._on_trouble(f"old checkpoints cannot be deleted; training goes on ({error})")
            self._cannot_delete = True

    def _prune(self, step: int) -> None:
        """Keeps the newest `keep` checkpoints, and the one with the best validation accuracy.

        Also deletes states of earlier steps whose commit is missing because of an outage. Leaves checkpoints of steps
        after `step`: they are damaged, since the resume skipped them, and will be replaced.
        """
        self._delete_uncommitted(before=bucket_layout.checkpoint(self._job.run_id, step))
        commits = [commit for commit in commits_of(self._store, self._job.run_id) if commit.step <= step]
        best = max(commits, key=lambda commit: commit.val_accuracy or 0.0, default=None)  # the newest of equals
        for commit in commits[self._config.keep :]:
            if commit is not best:
                delete_checkpoint(self._store, self._job.run_id, commit)

    def _delete_uncommitted(self, before: str = "~") -> None:
        """Deletes states without a commit, of checkpoints whose prefix sorts before the given one."""
        keys = {info.key for info in self._store.list(bucket_layout.checkpoints(self._job.run_id))}
        for key in keys:
            folder = key.removesuffix(STATE)
            if key.endswith(f"/{STATE}") and folder < before and folder + COMMIT not in keys:
                self._store.delete(key)


def commits_of(store: ObjectStore, run_id: str) -> Iterator[Commit]:
    """Yields a training's readable commits, newest first."""
    keys = [info.key for info in store.list(bucket_layout.checkpoints(run_id)) if info.key.endswith(f"/{COMMIT}")]
    for key in sorted(keys, reverse=True):
        if commit := store.read_record(key, Commit):
            yield commit


def delete_checkpoint(store: ObjectStore, run_id: str, commit: Commit) -> None:
    """Deletes a checkpoint: first the commit, then its files."""
    store.delete(bucket_layout.checkpoint(run_id, commit.step) + COMMIT)
    for key in commit.files:
        store.delete(key)


def newest_checkpoint(
    store: ObjectStore,
    run_id: str,
    manifest_digest: str,
    on_damage: Callable[[str], None],
    folder: Path | None = None,
) -> "tuple[Commit, dict[str, Tensor]] | None":
    """Returns the newest checkpoint whose files match their digests; None if there is no checkpoint.

    Args:
        manifest_digest: of the training that resumes; it must not use checkpoints of another training.
        on_damage: receives a line for each damaged checkpoint that is skipped.
        folder: for temporary files; None for the system's temporary folder.

    Raises:
        ServiceError: the storage failed (Outage: temporarily), or all checkpoints are damaged.
    """
    from safetensors.torch import load_file

    damaged = 0
    for commit in commits_of(store, run_id):
        if commit.manifest_digest != manifest_digest:
            raise ServiceError(f"the checkpoint of step {commit.step} of run {run_id} belongs to another training")
        ((key, digest),) = commit.files.items()
        try:
            with store.fetched(key, sha256=digest, folder=folder) as file:
                return commit, load_file(file)
        except Outage:  # says nothing about the checkpoint
            raise
        except (ServiceError, SafetensorError) as error:
            damaged += 1
            on_damage(f"the checkpoint of step {commit.step} cannot be used, trying the one before: {error}")
    if damaged:
        raise ServiceError(f"none of the {damaged} checkpoints of run {run_id} can be used; see the log")
    return None


def commit_weights(
    store: ObjectStore, job: Job, state: "Mapping[str, Tensor]", file: Path, outcome: Outcome
) -> Outcome:
    """Uploads and commits the final weights; returns the outcome with their key and digest.

    The key contains the digest, so that no other process of the run overwrites committed weights. If the run has
    already finished with the same weights, returns the outcome that was committed then.

    Args:
        file: where to keep the weights on this machine.
        outcome: of the training, without the weights.

    Raises:
        Outage: this machine's disk cannot take them now.
        ServiceError: the storage failed, or the training has already finished with other weights.
    """
    from cnn.networks.weights import save_weights

    try:
        digest = save_weights(state, file)
    except (SafetensorError, OSError) as error:  # a full disk, which may have space again
        raise Outage(f"the weights cannot be written: {error}") from error
    earlier = finished_outcome(store, job.run_id)
    if earlier is None:
        key = bucket_layout.trained_weights(job.run_id, digest)
        store.put_file(key, file)
        finished = outcome.model_copy(update={"weights_key": key, "weights_sha256": digest})
        if store.put_if_absent(bucket_layout.outcome(job.run_id), finished.model_dump_json().encode()):
            return finished
        earlier = finished_outcome(store, job.run_id)  # another process was faster
        assert earlier is not None
    if earlier.weights_sha256 != digest:
        raise ServiceError(f"run {job.run_id} has already finished with other weights: {earlier.weights_sha256}")
    return earlier


def finished_outcome(store: ObjectStore, run_id: str) -> Outcome | None:
    """Returns the outcome of a finished training; None if it has not finished."""
    try:
        return Outcome.model_validate_json(store.get_bytes(bucket_layout.outcome(run_id)))
    except ObjectMissing:
        return None
