"""Checkpoints of a training in the bucket: whole and committed, or not there.

runs/<run>/checkpoints/step-00005064/state.safetensors
runs/<run>/checkpoints/step-00005064/commit.json          written last, by a conditional put
runs/<run>/weights/<SHA-256 of the weights>.safetensors   those that the training is for; model.safetensors in old runs
runs/<run>/weights/commit.json                            how it finished; likewise

Only storing and loading tensors loads torch.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from safetensors import SafetensorError

from infra.errors import ServiceError, one_line
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
LONGEST_PAUSE = 30.0  # seconds between tries while the storage fails

Trouble = ServiceError | OSError


class CheckpointFailed(RuntimeError):
    """No checkpoint could be stored for so long that going on would risk too much work."""

    exit_status = 1
    status: Status = "failed"

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))  # whatever a library's error has


class Unsaved(CheckpointFailed):
    """The storage took no checkpoint for longer than `checkpoints.patience`."""

    status: Status = "unsaved"


class Commit(Record, extra="forbid"):
    """Says that a checkpoint is whole, how to verify it, and what is not in its tensors."""

    step: int
    manifest_digest: str
    """Of the training's `RunManifest`."""

    files: dict[str, str]
    """SHA-256 of each file, by its key."""

    val_accuracy: float | None = None
    """Of the last epoch before it."""

    train_seconds: float = 0.0
    """Of all processes that brought the training here."""

    metrics: tuple[dict[str, Any], ...] = ()
    """Rows (`MetricRow`) that the tracking server had not acknowledged."""

    committed: float
    """Seconds since 1970."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A state to be stored."""

    step: int
    state: "Mapping[str, Tensor]"
    """On the CPU; nobody changes it any more."""

    val_accuracy: float | None
    train_seconds: float
    metrics: tuple[dict[str, Any], ...]


class CheckpointWriter:
    """Stores snapshots from a thread of its own; training never waits for it.

    While one snapshot is on its way another may wait; a newer one takes its place. What fails is tried again, with
    the newest snapshot there is, until `config.patience` seconds have passed without a success.

    Args:
        store: the bucket.
        job: whose checkpoints these are.
        folder: where files are made; on this machine.
        config: how often, how many to keep, when to give up.
        on_trouble: told in one line when the storage begins to fail and when it works again.
        resumed: step of the checkpoint that the training goes on from; 0 if there is none.

    Attributes:
        committed: step of the last checkpoint that is whole.
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
        self._closing = False
        self._failing_since: float | None = None
        self._failed: CheckpointFailed | None = None
        self.committed = self._saved = resumed
        self._size = 0  # bytes of a snapshot
        self._speed: float | None = None  # bytes/s of the last upload
        self._cannot_delete = False
        self._last = time.monotonic()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
        self._thread.start()

    def is_due(self) -> bool:
        """Whether it is time for a snapshot, by the clock."""
        return time.monotonic() - self._last >= self._config.every

    def save(self, snapshot: Snapshot) -> None:
        """Hand over a snapshot.

        Raises:
            CheckpointFailed: storing has failed for too long.
        """
        with self._changed:
            self._raise_failure()
            self._last = time.monotonic()
            self._waiting, self._saved = snapshot, snapshot.step
            self._size = sum(tensor.nbytes for tensor in snapshot.state.values())
            self._changed.notify_all()

    @property
    def patience(self) -> float:
        """How long `close` should wait at a stop, in seconds, by the state's size and the last upload's speed."""
        return last_checkpoint(self._size, self._speed)

    def close(self, patience: float) -> bool:
        """Stores what is waiting, for at most so many seconds, and ends the thread.

        Returns:
            Whether the newest snapshot is stored. If not, the training goes on from `committed` when it is resumed.

        Raises:
            CheckpointFailed: for another reason than a slow or failing storage.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._failed or self.committed == self._saved, patience)
            if self._failed and not isinstance(self._failed, Unsaved):
                raise self._failed
            return self.committed == self._saved

    def _raise_failure(self) -> None:
        if self._failed:
            raise self._failed

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
                self._try_to_prune(snapshot.step)
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                if self._failed:
                    return

    def _put_back(self, snapshot: Snapshot, error: Trouble, pause: float) -> float:
        """Have the snapshot wait again, unless a newer one does; returns how long to pause next time."""
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
            self._on_trouble(f"the checkpoint of step {snapshot.step} cannot be stored yet; training goes on ({error})")
        with self._changed:
            if now - self._failing_since >= self._config.patience:
                patience = f"{self._config.patience:g} s (checkpoints.patience)"
                self._failed = Unsaved(f"no checkpoint could be stored for {patience}: {error}")
                return pause
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
            metrics=snapshot.metrics,
            committed=time.time(),
        )
        if not self._store.put_if_absent(prefix + COMMIT, commit.model_dump_json().encode()):
            self._check_earlier(prefix, files)

    def _check_earlier(self, prefix: str, files: dict[str, str]) -> None:
        """Done again after an older checkpoint was resumed, the same step has the same state, to the bit."""
        try:
            found = Commit.model_validate_json(self._store.get_bytes(prefix + COMMIT))
        except ObjectMissing:
            return
        except ValidationError:  # it counts for nobody, and would be in the way
            self._store.delete(prefix + COMMIT)
            return
        if found.files != files:
            raise CheckpointFailed(f"another process trains run {self._job.run_id}: {prefix} differs from ours")

    def _try_to_prune(self, step: int) -> None:
        """Prunes; that old checkpoints cannot be deleted is no reason to stop storing new ones."""
        try:
            self._prune(step)
        except (ServiceError, OSError) as error:
            if not self._cannot_delete:
                self._on_trouble(f"old checkpoints cannot be deleted; training goes on ({error})")
            self._cannot_delete = True

    def _prune(self, step: int) -> None:
        """Keeps the newest `keep`, and the one with the best validation accuracy.

        States of earlier steps without a commit go too: an outage came in between. Later ones than `step` are
        damaged, since resuming passed them over; they are made anew when it comes to them.
        """
        keys = {info.key for info in self._store.list(bucket_layout.checkpoints(self._job.run_id))}
        newest = bucket_layout.checkpoint(self._job.run_id, step)
        for key in keys:
            folder = key.removesuffix(STATE)
            if key.endswith(f"/{STATE}") and folder < newest and folder + COMMIT not in keys:
                self._store.delete(key)
        commits = [commit for commit in commits_of(self._store, self._job.run_id) if commit.step <= step]
        best = max(commits, key=lambda commit: commit.val_accuracy or 0.0)  # of equals the newest, which is first
        for commit in commits[self._config.keep :]:
            if commit is not best:
                delete_checkpoint(self._store, self._job.run_id, commit)


def commits_of(store: ObjectStore, run_id: str) -> Iterator[Commit]:
    """A training's commits, the newest first; those that cannot be read are left out."""
    keys = [info.key for info in store.list(bucket_layout.checkpoints(run_id)) if info.key.endswith(f"/{COMMIT}")]
    for key in sorted(keys, reverse=True):
        try:
            yield Commit.model_validate_json(store.get_bytes(key))
        except (ObjectMissing, ValidationError):
            continue


def delete_checkpoint(store: ObjectStore, run_id: str, commit: Commit) -> None:
    """Take back the commit, then its files."""
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
    """Returns the newest checkpoint whose files have the digests that it promises; None if there is none.

    Args:
        manifest_digest: of the training that wants it; the checkpoints of another are not for it.
        on_damage: told of each newer one that is damaged.
        folder: where files are put meanwhile; None for the system's temporary folder.

    Raises:
        ServiceError: the storage failed, or only damaged ones are left.
    """
    from safetensors.torch import load_file

    damaged = 0
    for commit in commits_of(store, run_id):
        if commit.manifest_digest != manifest_digest:
            raise ServiceError(f"the checkpoint of step {commit.step} of run {run_id} belongs to another training")
        ((key, digest),) = commit.files.items()
        try:
            with TemporaryDirectory(dir=folder) as temporary:
                file = Path(temporary) / STATE
                store.get_file(key, file, sha256=digest)
                return commit, load_file(file)
        except (ServiceError, SafetensorError) as error:
            damaged += 1
            on_damage(f"the checkpoint of step {commit.step} cannot be used, trying the one before: {error}")
    if damaged:
        raise ServiceError(f"none of the {damaged} checkpoints of run {run_id} can be used; see the log")
    return None


def commit_weights(
    store: ObjectStore, job: Job, state: "Mapping[str, Tensor]", file: Path, outcome: Outcome
) -> Outcome:
    """Writes the weights that a training is for, uploads and commits them; returns the outcome with their place.

    Their key is their digest, so that no other process of the run ever writes to what a commit names. If the run has
    finished before with the same weights, returns the outcome that was committed then.

    Args:
        file: where to leave them on this machine.
        outcome: of the training, weights apart.

    Raises:
        ServiceError: the storage failed, or the training has finished before, with other weights.
    """
    from cnn.networks.weights import save_weights

    digest = save_weights(state, file)
    if earlier := finished_outcome(store, job.run_id):
        return _same(earlier, digest, job.run_id)
    key = bucket_layout.trained_weights(job.run_id, digest)
    store.put_file(key, file)
    finished = outcome.model_copy(update={"weights_key": key, "weights_sha256": digest})
    if store.put_if_absent(bucket_layout.outcome(job.run_id), finished.model_dump_json().encode()):
        return finished
    winner = finished_outcome(store, job.run_id)
    assert winner is not None
    return _same(winner, digest, job.run_id)


def _same(earlier: Outcome, digest: str, run_id: str) -> Outcome:
    if earlier.weights_sha256 != digest:
        raise ServiceError(f"run {run_id} has finished before, with other weights: {earlier.weights_sha256}")
    return earlier


def finished_outcome(store: ObjectStore, run_id: str) -> Outcome | None:
    """How a training finished; None if it has not."""
    try:
        return Outcome.model_validate_json(store.get_bytes(bucket_layout.outcome(run_id)))
    except ObjectMissing:
        return None
