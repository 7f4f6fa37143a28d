"""Checkpoints in a real bucket: whole or absent, whatever fails in the storage or on the disk."""

import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from torch import Tensor

import infra
from cnn.config.training import TrainConfig
from cnn.networks.weights import weights_sha256
from infra.errors import Outage, ServiceError
from infra.settings import Settings
from infra.stack.local_stack import down, up
from infra.stack.state import StackFolder
from infra.storage.bucket_layout import COMMIT
from infra.storage.object_store import ObjectInfo, ObjectStore
from tasks.config.run import CheckpointConfig
from tasks.training.checkpoints import (
    CheckpointFailed,
    CheckpointWriter,
    Snapshot,
    commit_weights,
    commits_of,
    finished_outcome,
    newest_checkpoint,
)
from tasks.training.protocol import patience
from tasks.training.protocol.job import Job, Outcome
from tests.flows.program import wait_for
from tests.infra.localstack import S3, own, own_environment, use

__all__ = ["own", "own_environment"]  # fixtures

RUN = "f00d"
DIGEST = "d" * 64  # of the training's manifest
CLOSE = 60.0  # seconds that the last snapshot has on a busy machine


def state(step: int, size: int = 100) -> dict[str, Tensor]:
    """Tensors that must come back bit by bit: NaN, the smallest float, zero dimensions, no elements."""
    random = torch.Generator().manual_seed(step)
    return {
        "network/weight": torch.randn(size, 7, generator=random),
        "network/odd": torch.tensor([float("nan"), -0.0, 1e-45, float("inf")]),
        "optimizer/half": torch.randn(5, generator=random).bfloat16(),
        "progress/step": torch.tensor(step),
        "progress/recent": torch.zeros(0, 4, dtype=torch.float64),
    }


def snapshot(step: int, val_accuracy: float | None = None, size: int = 100) -> Snapshot:
    return Snapshot(
        step=step,
        state=state(step, size),
        val_accuracy=val_accuracy,
        train_seconds=1.5 * step,
        rank_seconds=3.0 * step,
        metrics=(),
    )


def bits(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    flat = {name: tensor.contiguous().flatten().view(torch.uint8) for name, tensor in tensors.items()}
    return {name: (tensor.dtype, tensor.shape, flat[name].numpy().tobytes()) for name, tensor in tensors.items()}


def job_with(checkpoints: CheckpointConfig) -> Job:
    return Job(
        run_id=RUN,
        config=TrainConfig(),
        dataset_version="0" * 64,
        world_size=1,
        manifest_digest=DIGEST,
        checkpoints=checkpoints,
        restarts=0,
    )


class Writing:
    """A CheckpointWriter with the lines that it has reported."""

    def __init__(self, store: ObjectStore, folder: Path, **config: float) -> None:
        job = job_with(CheckpointConfig.model_validate(config))
        folder.mkdir(exist_ok=True)
        self.folder, self.told = folder, list[str]()
        self.writer = CheckpointWriter(store, job, folder, job.checkpoints, self.told.append)

    def save(self, *snapshots: Snapshot) -> None:
        """Stores the snapshots, one after another."""
        for each in snapshots:
            self.writer.save(each)
            self.until_idle()
        self.writer.close(CLOSE)

    def until_idle(self) -> None:
        """Waits until no snapshot is queued or being uploaded."""

        def is_idle() -> bool:
            with self.writer._changed:
                return self.writer._waiting is None and not self.writer._busy

        wait_for(is_idle, "the snapshot to be stored")

    def until_taken(self) -> None:
        """Waits until the thread has taken the queued snapshot."""
        wait_for(lambda: self.writer._waiting is None, "the snapshot to be on its way")

    def failure(self) -> str:
        """Saves snapshots until one is refused; returns the reason."""
        refused = list[str]()

        def is_refused() -> bool:
            try:
                self.writer.save(snapshot(99))
            except CheckpointFailed as failed:
                refused.append(str(failed))
            return bool(refused)

        wait_for(is_refused, "a snapshot to be refused")
        return refused[0]


@pytest.fixture
def write(store: ObjectStore, tmp_path: Path) -> Callable[..., Writing]:
    """Starts writers of the same training."""
    return lambda **config: Writing(store, tmp_path / "files", **config)


def steps(store: ObjectStore) -> list[int]:
    return [commit.step for commit in commits_of(store, RUN)]


def newest(store: ObjectStore) -> tuple[int, list[str]]:
    """Returns the step of the checkpoint that a resume would use, and the warnings."""
    warnings: list[str] = []
    found = newest_checkpoint(store, RUN, DIGEST, warnings.append)
    assert found
    assert bits(found[1]) == bits(state(found[0].step))
    return found[0].step, warnings


def state_key(step: int) -> str:
    return f"runs/{RUN}/checkpoints/step-{step:08d}/state.safetensors"


def test_a_training_without_checkpoints_begins_anew(store: ObjectStore) -> None:
    assert newest_checkpoint(store, RUN, DIGEST, pytest.fail) is None


def test_a_checkpoint_comes_back_to_the_bit_with_all_that_its_commit_carries(
    store: ObjectStore, write: Callable[..., Writing]
) -> None:
    row = {"step": 7, "timestamp": 1, "values": {"loss": "NaN"}, "keep": True}
    kept = Snapshot(step=7, state=state(7), val_accuracy=0.25, train_seconds=12.5, rank_seconds=25.0, metrics=(row,))
    writing = write()
    writing.save(kept)
    found = newest_checkpoint(store, RUN, DIGEST, pytest.fail)
    assert found
    commit, tensors = found
    assert bits(tensors) == bits(dict(kept.state))
    assert (commit.step, commit.val_accuracy, commit.metrics) == (7, 0.25, (row,))
    assert (commit.train_seconds, commit.rank_seconds) == (12.5, 25.0)
    assert commit.manifest_digest == DIGEST
    assert list(writing.folder.iterdir()) == []  # no file is left behind
    assert writing.told == []


def test_the_newest_checkpoint_is_taken_by_its_step_not_by_its_time(
    store: ObjectStore, write: Callable[..., Writing]
) -> None:
    write(keep=9).save(snapshot(9), snapshot(100_000), snapshot(10))
    assert steps(store) == [100_000, 10, 9]
    assert newest(store) == (100_000, [])


def test_a_state_without_its_commit_does_not_count(store: ObjectStore, write: Callable[..., Writing]) -> None:
    write().save(snapshot(1))
    store.put_bytes(state_key(2), store.get_bytes(state_key(1)))  # the upload of step 2 was cut off before the commit
    assert newest(store) == (1, [])


def test_a_commit_that_cannot_be_read_does_not_count(store: ObjectStore, write: Callable[..., Writing]) -> None:
    write().save(snapshot(1), snapshot(2))
    store.put_bytes(state_key(2).replace("state.safetensors", "commit.json"), b'{"step": 2')
    assert newest(store)[0] == 1


@pytest.mark.parametrize("how", ["overwritten", "missing", "no tensors"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_with_a_warning(
    store: ObjectStore, write: Callable[..., Writing], how: str
) -> None:
    write(keep=3).save(snapshot(1), snapshot(2), snapshot(3))
    for step in (2, 3):
        if how == "missing":
            store.delete(state_key(step))
        else:
            whole = store.get_bytes(state_key(step))
            store.put_bytes(state_key(step), whole[:-1] + bytes([whole[-1] ^ 1]) if how == "overwritten" else b"")
    step, warnings = newest(store)
    assert step == 1
    assert [warning[: len("the checkpoint of step 3")] for warning in warnings] == [
        "the checkpoint of step 3",
        "the checkpoint of step 2",
    ]
    assert all("\n" not in warning for warning in warnings)


def test_an_outage_while_a_checkpoint_is_read_is_no_damage(
    store: ObjectStore, write: Callable[..., Writing], monkeypatch: pytest.MonkeyPatch
) -> None:
    write().save(snapshot(1), snapshot(2))

    def away(*_: object, **__: object) -> None:
        raise Outage("the store is away")

    monkeypatch.setattr(store, "get_file", away)
    with pytest.raises(Outage, match="the store is away"):
        newest_checkpoint(store, RUN, DIGEST, pytest.fail)


def test_a_training_never_begins_anew_when_only_damaged_checkpoints_are_left(
    store: ObjectStore, write: Callable[..., Writing]
) -> None:
    write().save(snapshot(1), snapshot(2))
    for step in (1, 2):
        store.put_bytes(state_key(step), b"damaged")
    warnings: list[str] = []
    with pytest.raises(ServiceError, match=f"none of the 2 checkpoints of run {RUN} can be used"):
        newest_checkpoint(store, RUN, DIGEST, warnings.append)
    assert len(warnings) == 2


def test_a_checkpoint_of_another_training_is_refused(store: ObjectStore, write: Callable[..., Writing]) -> None:
    write().save(snapshot(1))
    with pytest.raises(ServiceError, match=r"step 1 .* belongs to another training"):
        newest_checkpoint(store, RUN, "e" * 64, pytest.fail)


def test_old_checkpoints_go_with_their_files_but_not_the_best(
    store: ObjectStore, write: Callable[..., Writing]
) -> None:
    accuracies = {1: None, 2: 0.5, 3: 0.9, 4: 0.9, 5: 0.8, 6: 0.7, 7: 0.6}
    write(keep=2).save(*(snapshot(step, accuracy) for step, accuracy in accuracies.items()))
    assert steps(store) == [7, 6, 4]  # the newer of equals
    kept = {state_key(step).rpartition("/")[0] for step in (7, 6, 4)}
    assert {info.key.rpartition("/")[0] for info in store.list("")} == kept
    assert len(list(store.list(""))) == 2 * len(kept)


def test_a_damaged_checkpoint_is_whole_again_when_its_step_is_done_again(
    store: ObjectStore, write: Callable[..., Writing]
) -> None:
    write().save(snapshot(1), snapshot(2))
    store.put_bytes(state_key(2), b"damaged")
    write().save(snapshot(2))
    assert newest(store) == (2, [])


def test_a_commit_that_cannot_be_read_is_not_in_the_way(store: ObjectStore, write: Callable[..., Writing]) -> None:
    write().save(snapshot(1), snapshot(2))
    store.put_bytes(state_key(2).replace("state.safetensors", "commit.json"), b'{"step": 2')
    write().save(snapshot(2))
    assert newest(store) == (2, [])


def test_another_process_that_trains_the_same_run_differently_is_found_out(
    store: ObjectStore, write: Callable[..., Writing]
) -> None:
    write().save(snapshot(5))
    different = Snapshot(step=5, state=state(6), val_accuracy=None, train_seconds=0, rank_seconds=0, metrics=())
    writing = write()
    writing.writer.save(different)
    with pytest.raises(CheckpointFailed, match=f"^another process trains run {RUN}: .*step-00000005/ differs"):
        writing.writer.close(CLOSE)
    assert newest(store) == (5, [])  # and what it had stored is still whole


def test_a_bug_of_the_writer_ends_the_training_rather_than_looking_like_a_slow_upload(
    write: Callable[..., Writing],
) -> None:
    writing = write()
    shared = torch.zeros(3)  # which safetensors refuses under two names
    no_state = {"network/weight": shared, "network/bias": shared}
    writing.writer.save(
        Snapshot(step=1, state=no_state, val_accuracy=None, train_seconds=0, rank_seconds=0, metrics=())
    )
    writing.until_taken()
    reason = writing.failure()
    assert reason.startswith("no checkpoint: ")
    assert "\n" not in reason


# The storage of these can be stopped.


@pytest.fixture
def own_store(own: Settings, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """A bucket on the test's own server; requests are not retried, so that an outage shows soon."""
    monkeypatch.setattr("infra.storage.s3_client.TRIES", 1)
    use(up(own, only=S3), monkeypatch)
    return ObjectStore.connect(own.bucket)


@pytest.fixture
def frozen(own: Settings, own_store: ObjectStore) -> Iterator[Callable[[], None]]:
    """Makes the storage accept connections without an answer, until the returned function is called."""
    processes = StackFolder(own).members("seaweedfs")

    def wake() -> None:
        for process in processes:
            process.send_signal(signal.SIGCONT)

    for process in processes:
        process.send_signal(signal.SIGSTOP)
    yield wake
    wake()


def test_a_newer_snapshot_takes_the_place_of_one_that_waits_and_saving_never_waits(
    frozen: Callable[[], None], own_store: ObjectStore, tmp_path: Path
) -> None:
    writing = Writing(own_store, tmp_path / "files", keep=9)
    writing.writer.save(snapshot(1))
    writing.until_taken()
    for step in (2, 3, 4):
        writing.writer.save(snapshot(step))  # comes back, although the storage does not answer
    frozen()
    writing.writer.close(CLOSE)
    assert steps(own_store) == [4, 1]
    assert writing.told == []


@pytest.mark.long
def test_after_the_last_step_an_upload_that_runs_ends_with_its_commit_and_one_that_waits_is_dropped(
    frozen: Callable[[], None], own_store: ObjectStore, tmp_path: Path
) -> None:
    writing = Writing(own_store, tmp_path / "files", keep=9)
    writing.writer.save(snapshot(1))
    writing.until_taken()
    writing.writer.save(snapshot(2))
    threading.Timer(0.5, frozen).start()
    writing.writer.end()
    assert sorted(info.key.rpartition("/")[2] for info in own_store.list("")) == ["commit.json", "state.safetensors"]
    assert steps(own_store) == [1]
    writing.writer._thread.join(10)
    assert not writing.writer._thread.is_alive()


@pytest.mark.long
def test_an_outage_of_the_storage_costs_no_checkpoint_but_those_made_meanwhile(
    own: Settings, own_store: ObjectStore, tmp_path: Path
) -> None:
    writing = Writing(own_store, tmp_path / "files", keep=9)
    writing.writer.save(snapshot(1))
    writing.until_idle()
    down(own)
    for step in (2, 3, 4, 5):
        writing.writer.save(snapshot(step))
        wait_for(lambda: writing.told, "the outage to be noticed")
    up(own, only=S3)
    wait_for(lambda: len(writing.told) > 1, "the storage to be back")
    writing.writer.close(CLOSE)
    assert steps(own_store)[0] == 5
    assert steps(own_store)[-1] == 1
    began, ended = writing.told
    assert began.startswith("the checkpoint of step 2 cannot be stored yet; training goes on (object storage at ")
    assert ended.startswith("checkpoints are stored again, at step ")
    assert "\n" not in began


@pytest.mark.long
def test_the_last_snapshot_of_a_training_survives_an_outage_that_ends_in_time(
    own: Settings, own_store: ObjectStore, tmp_path: Path
) -> None:
    writing = Writing(own_store, tmp_path / "files")
    down(own)
    writing.writer.save(snapshot(1))
    wait_for(lambda: writing.told, "the outage to be noticed")
    up(own, only=S3)
    writing.writer.close(CLOSE)
    assert steps(own_store) == [1]


@pytest.mark.long
def test_a_stop_whose_checkpoint_cannot_be_stored_in_time_says_which_one_is_the_last(
    frozen: Callable[[], None], own_store: ObjectStore, tmp_path: Path
) -> None:
    writing = Writing(own_store, tmp_path / "files")
    writing.writer.save(snapshot(1))
    assert not writing.writer.close(1.0)
    assert writing.writer.committed == 0


@pytest.mark.long
def test_training_ends_when_no_checkpoint_can_be_stored_for_longer_than_patience(
    own: Settings, own_store: ObjectStore, tmp_path: Path
) -> None:
    writing = Writing(own_store, tmp_path / "files", patience=2)
    down(own)
    reason = writing.failure()
    assert reason.startswith("no checkpoint could be stored for 2 s (checkpoints.patience): object storage at ")
    assert "\n" not in reason
    assert len(writing.told) == 1
    assert not writing.writer.close(CLOSE)


class Unlisted(ObjectStore):
    """A bucket whose listing lags behind."""

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return iter(())


class Undeletable(ObjectStore):
    """A bucket whose policy forbids deletion."""

    def delete(self, key: str) -> None:
        raise ServiceError(f"{key}: AccessDenied")


def test_old_checkpoints_that_cannot_be_deleted_do_not_stop_new_ones(store: ObjectStore, tmp_path: Path) -> None:
    writing = Writing(Undeletable(store._client, store.bucket), tmp_path / "files", keep=1, patience=0.1)
    writing.save(*map(snapshot, range(1, 6)))
    assert steps(store) == [5, 4, 3, 2, 1]
    (told,) = writing.told
    assert told.startswith("old checkpoints cannot be deleted; training goes on (")


def test_a_bucket_that_lists_no_checkpoint_does_not_stop_new_ones(store: ObjectStore, tmp_path: Path) -> None:
    """As if a rule of the bucket had deleted them."""
    writing = Writing(Unlisted(store._client, store.bucket), tmp_path / "files", keep=1, patience=0.1)
    writing.save(*map(snapshot, range(1, 4)))
    assert (steps(store), writing.told) == ([3, 2, 1], [])


def test_a_state_without_its_commit_goes_with_the_next_checkpoint(
    store: ObjectStore, write: Callable[..., Writing]
) -> None:
    write().save(snapshot(1))
    for step in (2, 9):  # an outage came between state and commit
        store.put_bytes(state_key(step), store.get_bytes(state_key(1)))
    write().save(snapshot(3))
    states = [info.key for info in store.list("") if info.key.endswith("safetensors")]
    assert states == [state_key(1), state_key(3), state_key(9)]


def test_a_state_without_its_commit_goes_at_the_end_of_the_training(
    store: ObjectStore, write: Callable[..., Writing]
) -> None:
    """As of a rank that was killed at the last step, for which no checkpoint is stored again."""
    writing = write()
    writing.writer.save(snapshot(1))
    writing.until_idle()
    store.put_bytes(state_key(9), store.get_bytes(state_key(1)))
    writing.writer.end()
    assert [info.key for info in store.list("") if info.key.endswith("safetensors")] == [state_key(1)]


def test_the_patience_of_a_stop_grows_with_the_state_and_with_a_slow_upload_up_to_a_limit() -> None:
    small, large = patience.last_checkpoint(1000, None), patience.last_checkpoint(340 * 10**6, 100e6)
    slow = patience.last_checkpoint(340 * 10**6, 20e6)
    assert 15 <= small < large < slow < patience.last_checkpoint(340 * 10**6, 10e6) == patience.CHECKPOINT_MAX
    assert patience.last_checkpoint(10**12, None) == patience.CHECKPOINT_MAX


def test_each_process_outlasts_those_that_it_waits_for() -> None:
    rank = patience.STOP_STEP_WAIT + patience.CHECKPOINT_MAX + patience.METRICS_WAIT
    order = [
        rank,
        patience.TORCHRUN_WAIT,
        patience.SUPERVISOR_WAIT,
        patience.COORDINATOR_WAIT,
        patience.FLOW_WAIT,
        patience.WORKER_WAIT,
        patience.CONTAINER_GRACE,
    ]
    assert order == sorted(set(order))
    deployment = Path(infra.__path__[0])
    graces = [
        int(seconds)
        for name in ("kubernetes/training-job.yaml", "kubernetes/base-job-template.json")
        for seconds in re.findall(r'terminationGracePeriodSeconds"?: (\d+)', (deployment / name).read_text())
    ]
    assert len(graces) == 2
    assert min(graces) >= patience.CONTAINER_GRACE
    assert "stop_grace_period: 2m" in (deployment / "compose.yaml").read_text()


class SmallDisk:
    """A disk of one megabyte."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def grow(self) -> None:
        subprocess.run(["mount", "-o", "remount,size=16m", str(self.path)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    path = tmp_path / "small"
    path.mkdir()
    if os.geteuid():
        pytest.skip("only root can mount a small disk: run the tests as root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"small disks cannot be mounted (a container takes CAP_SYS_ADMIN for it): {mounted.stderr.strip()}")
    yield SmallDisk(path)
    subprocess.run(["umount", "--lazy", str(path)], check=True)


LARGE = 100_000  # rows, 2.8 MB


def test_a_full_disk_is_reported_and_the_newest_snapshot_stored_once_there_is_room(
    store: ObjectStore, small_disk: SmallDisk
) -> None:
    writing = Writing(store, small_disk.path)
    writing.writer.save(snapshot(1, size=LARGE))
    wait_for(lambda: writing.told, "the full disk to be noticed")
    assert list(small_disk.path.iterdir()) == []  # half a file would keep the disk full
    writing.writer.save(snapshot(2, size=LARGE))
    small_disk.grow()
    writing.writer.close(CLOSE)
    began, ended = writing.told
    assert began.startswith("the checkpoint of step 1 cannot be stored yet; training goes on (")
    assert "No space left" in began
    assert ended.startswith("checkpoints are stored again, at step ")
    assert steps(store)[0] == 2
    found = newest_checkpoint(store, RUN, DIGEST, pytest.fail)
    assert found
    assert bits(found[1]) == bits(state(2, LARGE))


def test_a_disk_that_stays_full_ends_the_training_with_the_reason(store: ObjectStore, small_disk: SmallDisk) -> None:
    (small_disk.path / "others").write_bytes(bytes(1 << 20))
    reason = Writing(store, small_disk.path, patience=1).failure()
    assert reason.startswith("no checkpoint could be stored for 1 s (checkpoints.patience): ")
    assert "No space left" in reason
    assert steps(store) == []


# The final weights


def finish(store: ObjectStore, folder: Path, step: int) -> Outcome:
    """Commits the weights of a training that ended in this state."""
    folder.mkdir(exist_ok=True)
    weights = {"weight": state(step)["network/weight"]}
    job = job_with(CheckpointConfig())
    return commit_weights(store, job, weights, folder / "model.safetensors", Outcome(status="finished", steps=step))


def test_committed_weights_are_never_replaced(store: ObjectStore, tmp_path: Path) -> None:
    first = finish(store, tmp_path / "first", 1)
    committed = store.get_bytes(first.weights_key)
    assert finish(store, tmp_path / "again", 1) == first
    with pytest.raises(ServiceError, match=f"already finished with other weights: {first.weights_sha256}"):
        finish(store, tmp_path / "other", 2)
    assert store.get_bytes(first.weights_key) == committed
    assert finished_outcome(store, RUN) == first


def test_a_full_disk_only_delays_the_final_weights(store: ObjectStore, small_disk: SmallDisk) -> None:
    others = small_disk.path / "others"
    others.write_bytes(bytes(1 << 20))
    with pytest.raises(Outage, match="No space left"):
        finish(store, small_disk.path, 1)
    others.unlink()
    assert finish(store, small_disk.path, 1) == finished_outcome(store, RUN)


def test_of_two_that_finish_at_once_with_other_weights_one_wins_and_its_bytes_stay(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = threading.Barrier(2)
    really_put = ObjectStore.put_file

    def put_file(store: ObjectStore, key: str, path: Path) -> str:
        both.wait(30)  # neither has seen a commit of the other
        return really_put(store, key, path)

    def finish_or_say(step: int) -> Outcome | str:
        try:
            return finish(store, tmp_path / str(step), step)
        except ServiceError as error:
            return str(error)

    monkeypatch.setattr(ObjectStore, "put_file", put_file)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(finish_or_say, (1, 2)))
    (winner,) = [each for each in results if isinstance(each, Outcome)]
    (loser,) = [each for each in results if isinstance(each, str)]
    assert winner.weights_sha256 in loser
    weights = load(store.get_bytes(winner.weights_key))
    assert weights_sha256(weights) == winner.weights_sha256


def test_weights_under_the_key_of_an_older_convoy_are_found(store: ObjectStore, tmp_path: Path) -> None:
    first = finish(store, tmp_path / "files", 1)
    key = f"runs/{RUN}/weights/model.safetensors"
    older = first.model_copy(update={"weights_key": key})
    store.put_bytes(key, store.get_bytes(first.weights_key))
    store.put_bytes(f"runs/{RUN}/weights/{COMMIT}", older.model_dump_json().encode())
    assert finish(store, tmp_path / "files", 1) == older
