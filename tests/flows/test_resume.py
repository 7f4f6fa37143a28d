"""A disturbed and resumed training ends like an undisturbed one: the same bits, with one whole history."""

import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from prefect import flow

from flows.summary import Summary
from infra.errors import UsageError
from infra.settings import Settings
from infra.storage.object_store import ObjectStore, open_bucket
from infra.tracking import mlflow_runs
from infra.tracking.model_registry import ModelVersion, RegisteredVersion, delete_alias
from infra.tracking.model_versions import find_version
from infra.tracking.promotion_history import history
from infra.tracking.tags import FLOW_RUN, MANIFEST_DIGEST
from tasks.config.run import RunConfig, load_config
from tasks.data.dataset import DatasetRef
from tasks.training.checkpoints import commits_of
from tasks.training.protocol.board import Board, Instruction
from tasks.training.protocol.job import JobFolder
from tasks.training.runs.run_record import RunRecord, check_same_result, read_record
from tasks.training.runs.tracked_run import tracked_run
from tests.flows.conftest import Convoy
from tests.flows.program import (
    ENDS_WITHIN,
    RESUMABLE,
    RESUMABLE_STEPS,
    NextTraining,
    Program,
    Training,
    assert_as_undisturbed,
    sets,
)

TRAIN = ("--dataset", "digits", "--name", "resumed")
OPTIONS = {"dataset": "digits", "name": "resumed"}
THIRD = RESUMABLE_STEPS // 3


@pytest.fixture(scope="module")
def undisturbed(stack: object, quiet_prefect: None) -> Summary:
    """The undisturbed training."""
    from flows.train import train_flow

    return train_flow(load_config(None, [*RESUMABLE, "ranks=2"], OPTIONS))


@pytest.fixture
def summary(tmp_path: Path) -> Callable[[], Summary]:
    return lambda: Summary.model_validate_json((tmp_path / "out.json").read_bytes())


@pytest.fixture
def bucket(stack: object, settings: Settings) -> ObjectStore:
    return ObjectStore.connect(settings.bucket, create=False)


@pytest.fixture
def resume(convoy: Convoy, tmp_path: Path, summary: Callable[[], Summary]) -> Callable[..., Summary]:
    """Resumes a training by the command line."""

    def run(training: Training, ranks: int) -> Summary:
        to = str(tmp_path / "out.json")
        done = convoy("resume", training.run_id, "--ranks", str(ranks), "--summary", to)
        assert done.status == 0, done.stderr
        return summary()

    return run


@dataclass(frozen=True)
class Survived:
    """What a flow run with several failures leaves behind."""

    summary: Summary
    training: Training
    events: list[bytes]
    """The outcome that the ranks wrote, at each try of the registration."""
    published: list[RegisteredVersion]
    """The version, at each try of the publication of its page."""


@pytest.fixture(scope="module")
def survived(undisturbed: Summary, settings: Settings) -> Survived:
    """A flow run that Prefect runs three times.

    First a rank is killed, and the registration fails; then the page fails, after the promotion.
    """
    from flows import candidate
    from flows.train import train_flow
    from tasks.release.register import register
    from tasks.release.report_page import publish_page

    next_training = NextTraining(settings)
    events: list[bytes] = []
    published: list[RegisteredVersion] = []

    def kill_a_rank() -> None:
        training = next_training.starts()
        training.comes_to(THIRD)
        training.rank(1).kill()

    def fail_to_register_once(*arguments: Any) -> ModelVersion:
        events.append((next_training.starts().folder / "events.jsonl").read_bytes())
        if len(events) == 1:
            raise OSError("the first try of the registration fails")
        return register(*arguments)

    def fail_to_publish_once(version: RegisteredVersion) -> None:
        published.append(version)
        if len(published) == 1:
            delete_alias(version.name, "champion")  # as if the process had died before it was set
            raise OSError("the first try of the page fails")
        publish_page(version)

    promoted = ("promote=true", "gate.max_latency_ms=60000", "ranks=2")
    config = load_config(None, [*RESUMABLE, *promoted], OPTIONS | {"name": "survived"})
    killer = threading.Thread(target=kill_a_rank, daemon=True)
    killer.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidate, "register", fail_to_register_once)
        patch.setattr(candidate, "publish_page", fail_to_publish_once)
        summary = train_flow.with_options(retries=2, retry_delay_seconds=0)(config)
    killer.join()
    return Survived(summary, next_training.starts(), events, published)


# First, so that the two trainings do not share one test's time limit.
@pytest.mark.long
def test_a_finished_run_is_not_resumed(undisturbed: Summary, convoy: Convoy) -> None:
    run_id = undisturbed.mlflow_run_id or ""
    done = convoy("resume", run_id)
    assert (done.status, done.complaint) == (2, f"run {run_id} has finished; there is nothing to resume")
    assert MlflowClient().get_run(run_id).info.status == "FINISHED"


@pytest.mark.long
def test_weights_and_history_are_those_of_the_undisturbed_training_after_a_rank_was_killed(
    survived: Survived, undisturbed: Summary
) -> None:
    assert b"rank 1 was killed by SIGKILL; starting again from the last checkpoint" in survived.events[0]
    assert len(list(survived.training.folder.glob("train.log*"))) == 2
    assert_as_undisturbed(survived.summary, undisturbed)


@pytest.mark.long
def test_a_flow_run_that_prefect_tries_again_goes_on_in_its_mlflow_run_and_does_not_train_again(
    survived: Survived,
) -> None:
    runs = mlflow_runs.search_runs(FLOW_RUN, survived.summary.prefect_flow_run_id, limit=9)
    assert [run.run_id for run in runs] == [survived.training.run_id] == [survived.summary.mlflow_run_id]
    first, *others = survived.events
    assert others == [first, first]  # the ranks would have begun another account of what they do


@pytest.mark.long
def test_an_evaluation_that_is_done_again_is_recorded_once(survived: Survived) -> None:
    points = MlflowClient().get_metric_history(survived.training.run_id, "test/accuracy")
    assert len(points) == 1


@pytest.mark.long
def test_a_flow_that_dies_after_the_promotion_has_only_the_rest_to_do(survived: Survived, bucket: ObjectStore) -> None:
    summary = survived.summary
    assert len(survived.published) == 2
    (entry,) = history(bucket, "survived")
    assert (summary.champion, summary.verdict) == (True, entry.verdict_summary)
    assert (entry.run_id, entry.dataset_version) == (summary.mlflow_run_id, summary.dataset_version)
    assert entry.weights_sha256 == summary.weights_sha256
    version = find_version("survived@champion")
    assert version.tags["convoy.verdict_sha256"] == entry.verdict_sha256
    run = MlflowClient().get_run(version.run_id)
    assert run.info.status == "FINISHED"
    final = [name for name in run.data.metrics if name.partition("/")[0] in ("test", "cost", "data")]
    assert len(final) > 10
    assert {name: len(MlflowClient().get_metric_history(version.run_id, name)) for name in final} == dict.fromkeys(
        final, 1
    )


@pytest.mark.slow
def test_weights_and_history_are_those_of_the_undisturbed_training_after_the_flow_was_killed(
    undisturbed: Summary,
    program: Callable[..., Program],
    next_training: NextTraining,
    resume: Callable[..., Summary],
) -> None:
    flow = program("train", *TRAIN, "--ranks", "2", *sets(*RESUMABLE))
    training = next_training.starts()
    training.comes_to(THIRD)
    flow.process.kill()
    training.assert_ends()
    assert MlflowClient().get_run(training.run_id).info.status == "RUNNING"  # no process was left to change it
    found = resume(training, ranks=1)
    assert (found.world_size, found.mlflow_run_id) == (1, training.run_id)
    assert min(training.reported()) > 1
    assert_as_undisturbed(found, undisturbed)


@pytest.mark.slow
def test_weights_and_history_are_those_of_the_undisturbed_training_after_a_sigterm(
    undisturbed: Summary,
    program: Callable[..., Program],
    next_training: NextTraining,
    resume: Callable[..., Summary],
    summary: Callable[[], Summary],
    bucket: ObjectStore,
) -> None:
    flow = program("train", *TRAIN, "--ranks", "1", *sets(*RESUMABLE), "--summary", "out.json")
    training = next_training.starts()
    training.comes_to(THIRD)
    flow.process.send_signal(signal.SIGTERM)
    assert flow.wait(ENDS_WITHIN).status == 75
    assert training.processes() == []
    assert (summary().status, summary().exit_status) == ("interrupted", 75)
    assert MlflowClient().get_run(training.run_id).info.status == "KILLED"
    outcome = JobFolder(training.folder).read_outcome()
    assert outcome
    assert outcome.status == "interrupted"
    assert next(commits_of(bucket, training.run_id)).step == outcome.steps < RESUMABLE_STEPS
    found = resume(training, ranks=2)
    assert min(training.reported()) == outcome.steps + 1  # no step was done again
    assert_as_undisturbed(found, undisturbed)


# What cannot be resumed


@pytest.fixture
def unfinished(undisturbed: Summary) -> str:
    """Id of a run that failed before its first step."""
    record = read_record(undisturbed.mlflow_run_id or "")
    return open_and_fail(record.config, record.dataset)


def open_and_fail(config: RunConfig, dataset: DatasetRef) -> str:
    run_id = ""
    with pytest.raises(OSError, match="on purpose"), tracked_run(config, dataset) as run:
        run_id = run.run_id
        raise OSError("on purpose")
    return run_id


@pytest.mark.long
def test_a_run_that_finished_while_its_resume_waited_is_not_opened_again(undisturbed: Summary) -> None:
    from flows.train import train_flow

    run_id = undisturbed.mlflow_run_id or ""
    record = read_record(run_id)
    before = MlflowClient().get_run(run_id).info
    with pytest.raises(UsageError, match="has finished"):  # the command looked before, when it was still running
        train_flow(record.config, resume=run_id)
    with pytest.raises(UsageError, match="has finished"), tracked_run(record.config, record.dataset, run_id):
        pytest.fail("it was opened")
    after = MlflowClient().get_run(run_id).info
    assert (after.status, after.end_time) == ("FINISHED", before.end_time)


@pytest.mark.long
def test_nodes_of_a_flow_that_was_killed_leave_when_its_training_is_resumed_without_them(unfinished: str) -> None:
    """Two first ranks would log the same steps."""
    record, board = read_record(unfinished), Board(open_bucket(), unfinished)
    board.write_order(Instruction(beat=1))
    with tracked_run(record.config, record.dataset, unfinished):
        assert board.order() is None


@pytest.mark.long
def test_a_flow_run_that_is_tried_again_leaves_its_finished_run_closed(undisturbed: Summary) -> None:
    record = read_record(undisturbed.mlflow_run_id or "")

    @flow
    def tried_again() -> list[str]:
        statuses = []
        for _ in range(2):
            with tracked_run(record.config, record.dataset) as run:
                statuses.append(mlflow_runs.run_status(run.run_id))
        return statuses

    assert tried_again() == ["RUNNING", "FINISHED"]


@pytest.mark.long
@pytest.mark.parametrize("run_id", ["0" * 32, "no-run", "../x"])
def test_an_unknown_run_is_refused(stack: object, bucket: ObjectStore, convoy: Convoy, run_id: str) -> None:
    done = convoy("resume", run_id)
    assert (done.status, done.stdout) == (2, "")
    assert done.complaint == f"no run {run_id} in bucket {bucket.bucket}; `convoy runs` lists them"


@pytest.mark.long
def test_ranks_that_cannot_share_the_lanes_are_refused(unfinished: str, convoy: Convoy) -> None:
    done = convoy("resume", unfinished, "--ranks", "3")
    assert done.status == 2
    assert "nearest are 2 and 4" in done.complaint


@pytest.mark.long
def test_keys_that_decide_the_result_are_refused_before_anything_starts(unfinished: str, convoy: Convoy) -> None:
    done = convoy("resume", unfinished, *sets("epochs=3", "data.split_seed=1", "checkpoints.keep=3"))
    assert done.status == 2
    assert done.stderr.splitlines() == [f"convoy: {done.complaint}"]
    assert done.complaint.startswith(f"run {unfinished} cannot go on here, because its weights would differ: ")
    assert "data.split_seed was 0, is 1; epochs was " in done.complaint
    assert done.complaint.endswith(", is 3; leave them out, or train again")


@pytest.mark.long
def test_place_of_raw_files_does_not_count_as_a_difference() -> None:
    given = load_config(None, (), {"dataset": "digits"})
    check_same_result("1a2b", given, load_config(None, ["data.keep_raw=true", "ranks=1"], {"dataset": "digits"}))
    with pytest.raises(UsageError, match=r"differ: data\.split_seed was 0, is 1; leave it out"):
        check_same_result("1a2b", given, load_config(None, ["data.split_seed=1"], {"dataset": "digits"}))


@pytest.mark.long
def test_a_run_that_was_made_differently_is_refused_with_what_differs(
    unfinished: str, bucket: ObjectStore, convoy: Convoy
) -> None:
    record = read_record(unfinished)
    config = record.manifest.config | {"lr": 0.125}
    manifest = record.manifest.model_copy(update={"torch": "0.0.1", "code_digest": "c" * 64, "config": config})
    changed = RunRecord(config=record.config, dataset=record.dataset, manifest=manifest)
    bucket.put_bytes(f"runs/{unfinished}/run.json", changed.model_dump_json().encode())
    done = convoy("resume", unfinished)
    assert done.status == 2
    told = done.complaint
    assert told.startswith(f"run {unfinished} cannot go on here, because its weights would differ: ")
    assert "config.lr was 0.125, is 0.1" in told
    assert "torch was 0.0.1, is " in told
    assert f"code_digest was {'c' * 64}, is " in told
    assert "batch_size" not in told  # only what differs
    older = manifest.model_copy(update={"digest_format": 1})
    record = RunRecord(config=record.config, dataset=record.dataset, manifest=older)
    bucket.put_bytes(f"runs/{unfinished}/run.json", record.model_dump_json(exclude_defaults=True).encode())
    done = convoy("resume", unfinished)
    assert done.status == 2
    assert done.complaint.startswith(f"run {unfinished} cannot go on here: another version of Convoy started it")
    bucket.put_bytes(f"runs/{unfinished}/run.json", changed.model_dump_json().encode())
    assert MlflowClient().get_run(unfinished).info.status == "FAILED"


@pytest.mark.long
def test_a_run_whose_dataset_is_gone_is_refused(undisturbed: Summary, bucket: ObjectStore, convoy: Convoy) -> None:
    record = read_record(undisturbed.mlflow_run_id or "")
    run_id = open_and_fail(record.config, record.dataset)
    gone = record.model_copy(update={"dataset": record.dataset.model_copy(update={"version": "0" * 64})})
    bucket.put_bytes(f"runs/{run_id}/run.json", gone.model_dump_json().encode())
    done = convoy("resume", run_id)
    assert done.status == 2
    assert f"the bucket lacks parts of dataset version {'0' * 64}" in done.complaint


# The list of trainings


@pytest.mark.long
def test_the_newest_run_is_found_by_scripts(unfinished: str, convoy: Convoy) -> None:
    done = convoy("runs", "--last", "--id")
    assert (done.status, done.stdout) == (0, unfinished + "\n")


@pytest.mark.long
def test_runs_are_listed_the_newest_first_with_how_they_stand(
    undisturbed: Summary, unfinished: str, convoy: Convoy
) -> None:
    done = convoy("runs", "--limit", "1000")
    assert done.status == 0
    rows = {line.split()[0]: line for line in done.stdout.splitlines()}
    ids = list(rows)
    assert ids[1] == unfinished
    finished = undisturbed.mlflow_run_id or ""
    assert ids.index(finished) > 1
    assert "FAILED" in rows[unfinished]
    assert f" {RESUMABLE_STEPS} " in rows[finished]
    assert "FINISHED" in rows[finished]


@pytest.mark.long
def test_a_run_that_was_killed_while_it_was_opened_does_not_spoil_the_list(unfinished: str, convoy: Convoy) -> None:
    run_id = mlflow_runs.start_run("digits", "killed at once", {}, {MANIFEST_DIGEST: "d" * 64})
    try:
        done = convoy("runs", "--limit", "1000")
        assert done.status == 0, done.stderr
        assert unfinished in done.stdout
        # The newest run is not passed over: a script would resume another training.
        assert convoy("runs", "--last", "--id").stdout == run_id + "\n"
        assert convoy("resume", run_id).status == 2
    finally:
        MlflowClient().delete_run(run_id)
