"""What the train task and the ranks tell each other through files."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from cnn.config import TrainConfig
from tasks.config import CheckpointConfig
from tasks.job import Event, Job, JobFolder, Outcome

JOB = Job(
    run_id="f00d",
    config=TrainConfig.model_validate({"model": "notes", "network": {"dropout": 0.5}, "augment": {"shift": 1}}),
    dataset_version="ab" * 32,
    world_size=2,
    manifest_digest="cd" * 32,
    checkpoints=CheckpointConfig(),
    restarts=3,
)
EVENT = Event(step=1, total_steps=10, epoch=1, loss=0.5)
TORCHRUN_SAYS = """\
tasks.rank FAILED
-------------------------------------------------------
Failures:
[1]:
  time      : 2026-11-24_07:59:31
  host      : localhost
  rank      : 0 (local_rank: 0)
  exitcode  : {first}
  error_file: <N/A>
  traceback : {first_says}
-------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-24_07:59:31
  host      : localhost
  rank      : 1 (local_rank: 1)
  exitcode  : {root}
  error_file: <N/A>
  traceback : {root_says}
=======================================================
"""


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    folder = JobFolder(tmp_path / "runs" / "f00d")
    folder.write_job(JOB)
    return folder


def test_job_comes_back_as_it_was_given_with_the_options_of_its_network(folder: JobFolder) -> None:
    assert folder.read_job() == JOB
    assert folder.read_job().config.network.model_dump()["dropout"] == 0.5


def test_events_are_read_once_each_in_order(folder: JobFolder) -> None:
    assert list(folder.new_events()) == []
    events = [EVENT.model_copy(update={"step": step}) for step in range(1, 5)]
    for event in events[:2]:
        folder.write_event(event)
    assert list(folder.new_events()) == events[:2]
    for event in events[2:]:
        folder.write_event(event)
    assert list(folder.new_events()) == events[2:]
    assert list(folder.new_events()) == []
    assert list(JobFolder(folder.path).new_events()) == events


def test_line_that_is_still_being_written_waits(folder: JobFolder) -> None:
    line = EVENT.model_dump_json().encode() + b"\n"
    events = folder.path / "events.jsonl"
    events.write_bytes(line + line[:9])
    assert list(folder.new_events()) == [EVENT]
    assert list(folder.new_events()) == []
    events.write_bytes(line + line)
    assert list(folder.new_events()) == [EVENT]


def test_new_job_in_a_used_folder_starts_without_the_old_news(folder: JobFolder) -> None:
    folder.write_event(EVENT)
    folder.write_outcome(Outcome(status="finished", weights_key="old"))
    folder.write_job(JOB)
    assert list(JobFolder(folder.path).new_events()) == []
    assert folder.read_outcome() is None


def test_first_outcome_counts(folder: JobFolder) -> None:
    assert folder.read_outcome() is None
    first = Outcome(status="failed", error="too few images", exit_status=2)
    folder.write_outcome(first)
    folder.write_outcome(Outcome(status="crashed", error="the other rank is gone", exit_status=1))
    assert folder.read_outcome() == first
    assert {file.name for file in folder.path.iterdir()} == {"job.json", "outcome.json"}


def test_damaged_outcome_is_not_taken_for_a_finished_training(folder: JobFolder) -> None:
    (folder.path / "outcome.json").write_text('{"status": "fin')
    with pytest.raises(ValidationError):
        folder.read_outcome()


@pytest.mark.parametrize(
    "first, root, killed",
    [
        ("-15 (pid: 11)  (SIGTERM)", "-9 (pid: 12)  (SIGKILL)", "rank 1 was killed by SIGKILL"),
        ("1 (pid: 11)", "-11 (pid: 12)  (SIGSEGV)", "rank 1 was killed by SIGSEGV"),
        ("-9 (pid: 11)  (SIGKILL)", "1 (pid: 12)", "rank 0 was killed by SIGKILL"),
        ("-15 (pid: 11)  (SIGTERM)", "1 (pid: 12)", None),
        ("1 (pid: 11)", "1 (pid: 12)", None),
    ],
)
def test_rank_that_was_killed_is_told_from_those_that_failed_since_it_was_gone(
    folder: JobFolder, first: str, root: str, killed: str | None
) -> None:
    assert folder.killed() is None
    says = "Signal 9 (SIGKILL) received by PID 12"
    folder.log.write_text(TORCHRUN_SAYS.format(first=first, root=root, first_says=says, root_says=says))
    assert folder.killed() == killed


def test_end_of_the_log_is_one_line_and_never_nothing(folder: JobFolder) -> None:
    assert folder.log_end() == "they were killed"
    folder.log.write_bytes(b"one\n\ntwo \xff\nthree\nfour\n\n")
    assert folder.log_end() == "two \ufffd | three | four"


def test_a_full_disk_costs_events_and_no_more(folder: JobFolder) -> None:
    events = folder.path / "events.jsonl"
    events.symlink_to("/dev/full")
    folder.write_event(EVENT)
    events.unlink()
    events.write_text('{"step": 1, "tot')  # what there was room for
    folder.write_event(EVENT)
    folder.write_event(EVENT)
    assert list(folder.new_events()) == [EVENT]
