"""The messages between the train task and the ranks, as files."""

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

from cnn.config.training import TrainConfig
from tasks.config.launchers import Launch, Launcher
from tasks.config.run import CheckpointConfig, load_config
from tasks.training.protocol.job import SPARE_OUTCOME, Event, Job, JobFolder, Outcome, Restarts, spare_outcome

JOB = Job(
    run_id="f00d",
    config=TrainConfig.model_validate({"model": "notes", "network": {"dropout": 0.5}, "augment": {"shift": 1}}),
    dataset_version="ab" * 32,
    world_size=2,
    manifest_digest="cd" * 32,
    code_digest="ef" * 32,
    checkpoints=CheckpointConfig(),
    restarts=3,
)
EVENT = Event(step=1, total_steps=10, epoch=1, loss=0.5)
TORCHRUN_SAYS = """\
tasks.training.rank FAILED
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


@pytest.mark.parametrize("launcher", get_args(Launcher))
def test_job_names_a_launcher_that_there_is_with_its_own_options(folder: JobFolder, launcher: str) -> None:
    options = ["kubernetes.image=convoy:1", "ray.cpus=2", "nodes.patience=7"]
    config = load_config(None, [f"launcher={launcher}", *options])
    folder.write_job(JOB.model_copy(update={"launch": Launch.model_validate(config, from_attributes=True)}))
    launch = folder.read_job().launch
    assert (launch.launcher, launch.nodes.patience) == (launcher, 7)
    assert dict(launch).items() <= dict(config).items()
    assert find_spec(f"tasks.training.launchers.{launcher}")


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


def test_what_people_are_told_is_one_line_whatever_a_librarys_error_has() -> None:
    error = "RuntimeError:\n            Some tensors share memory.\n            More information at: "
    line = "RuntimeError: Some tensors share memory. More information at:"
    assert Outcome(status="crashed", error=error).error == line
    assert (Event(warning=error).warning, Event(note=error).note) == (line, line)


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
        ("-15 (pid: 11)  (SIGTERM)", "-15 (pid: 12)  (SIGTERM)", "rank 1 was killed by SIGTERM"),
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


@pytest.fixture
def full_disk(folder: JobFolder, monkeypatch: pytest.MonkeyPatch) -> Iterator[JobFolder]:
    """A job folder on a full disk."""
    if os.geteuid():
        pytest.skip("only root can mount a small disk")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder.path)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    folder.write_job(JOB)
    folder.write_event(EVENT)
    filler = (folder.path / "filler").open("wb", buffering=0)
    with pytest.raises(OSError, match="No space left"):
        while True:
            filler.write(bytes(4096))
    filler.close()
    yield folder
    subprocess.run(["umount", "--lazy", str(folder.path)], check=True)


def test_a_full_disk_costs_events_and_nothing_else(full_disk: JobFolder) -> None:
    for _ in range(100):  # the file's last block holds some events, and a part of one
        full_disk.write_event(EVENT)
    (full_disk.path / "filler").unlink()
    last = EVENT.model_copy(update={"step": 7})
    for _ in range(2):  # the first may share its line with the part
        full_disk.write_event(last)
    events = list(full_disk.new_events())
    assert events[0] == EVENT
    assert events[-1] == last
    assert full_disk.last_step() == 7


def test_an_outcome_that_no_disk_takes_reaches_the_flow_all_the_same(full_disk: JobFolder) -> None:
    first = Outcome(status="failed", error="No space left on device", exit_status=1)
    say = (
        "import sys; from pathlib import Path; from tasks.training.protocol.job import JobFolder, Outcome; "
        "JobFolder(Path(sys.argv[1])).write_outcome(Outcome.model_validate_json(sys.argv[2]))"
    )
    with spare_outcome():
        assert full_disk.read_outcome() is None
        for outcome in (first, Outcome(status="crashed", error="the other rank is gone", exit_status=1)):
            arguments = [str(full_disk.path), outcome.model_dump_json()]
            subprocess.run([sys.executable, "-P", "-c", say, *arguments], check=True)
        assert full_disk.read_outcome() == first
        full_disk.start_again()
        assert full_disk.read_outcome() is None
    assert not list(full_disk.path.glob(".outcome*"))


def test_processes_of_a_flow_that_has_gone_end_without_its_memory(
    full_disk: JobFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as flow:
        place = f"/proc/{flow.pid}/fd/0"
        flow.communicate(b"\n")
    monkeypatch.setenv(SPARE_OUTCOME, place)
    full_disk.write_outcome(Outcome(status="crashed", error="the other rank is gone", exit_status=1))
    assert full_disk.read_outcome() is None
    full_disk.start_again()


def test_restarts_are_counted_anew_after_a_step_forward(folder: JobFolder) -> None:
    restarts = Restarts(folder)
    assert [restarts.take() for _ in range(4)] == [True, True, True, False]
    folder.write_event(EVENT)
    assert [restarts.take() for _ in range(4)] == [True, True, True, False]


def test_end_of_the_log_is_one_line_and_never_nothing(folder: JobFolder) -> None:
    assert folder.log_end() == "they were killed"
    folder.log.write_bytes(b"one\n\ntwo \xff\nthree\nfour\n\n")
    assert folder.log_end() == "two \ufffd | three | four"
