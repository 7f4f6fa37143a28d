"""What the doctor finds and settles, and what it leaves alone, with real servers and real processes."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID, uuid4

import boto3
import psutil
import pytest
from mlflow.tracking import MlflowClient
from prefect import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.context import refresh_global_settings_context
from prefect.settings import PREFECT_UI_URL, temporary_settings
from prefect.states import AwaitingRetry, Cancelled, Cancelling, Completed, Failed, Paused, Running

from infra.errors import UsageError
from infra.machine.locks import locked
from infra.settings import Settings
from infra.storage import bucket_layout
from infra.storage.bucket_layout import COMMIT, invitation
from infra.storage.object_store import ObjectStore
from infra.tracking import mlflow_runs
from infra.tracking.model_registry import aliased, set_alias
from infra.tracking.promotion_history import promote
from infra.tracking.tags import FLOW_RUN, FLOW_RUN_URL, SWEEP
from tasks.config.sweep import SweepConfig
from tasks.data.dataset import DatasetRef
from tasks.training import liveness, sweep
from tasks.training.checkpoints import STATE
from tasks.training.liveness import DEAD_AFTER_SECONDS, hold_run_lock, lock_file
from tasks.training.protocol.board import Board, Instruction
from tasks.training.sweep import SweepRecord
from tasks.upkeep.doctor import Finding, _delete_checkpoint, find_orphans, settle, settle_all
from tests.tasks.leftovers import Leftovers, flow_run_in

NOW = timedelta(seconds=-1)  # a grace that even the newest has had
HOLD = """
import sys
from tasks.training.liveness import hold_run_lock
with hold_run_lock(sys.argv[1], sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""
FINAL = {"completed": Completed, "failed": Failed, "cancelled": Cancelled}
OPEN = {"running": Running, "cancelling": Cancelling, "paused": Paused}


@pytest.fixture
def made(stack: object, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Leftovers]:
    """An empty MLflow and bucket, without the runs of other tests."""
    monkeypatch.setenv("CONVOY_BUCKET", "test")
    monkeypatch.setenv("CONVOY_HOME", str(tmp_path / "home"))
    refresh_global_settings_context()
    leftovers = Leftovers(store, monkeypatch)
    leftovers.hide_others(monkeypatch)
    yield leftovers
    leftovers.end()


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a program; what still runs at the end of the test is killed."""
    started: list[subprocess.Popen[str]] = []

    def run(*command: str) -> subprocess.Popen[str]:
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def hold(start: Callable[..., subprocess.Popen[str]], run_id: str, flow_run: object) -> subprocess.Popen[str]:
    """A process that continues a run."""
    process = start(sys.executable, "-c", HOLD, run_id, str(flow_run))
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


def running(made: Leftovers, flow_run: FlowRun | UUID) -> str:
    """An MLflow run with the status RUNNING."""
    return made.run("RUNNING", flow_run=str(flow_run if isinstance(flow_run, UUID) else flow_run.id))


def state_of(flow_run: FlowRun) -> str:
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(flow_run.id).state
    assert state
    return str(state.name)


def whats(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.kind, finding.what) for finding in findings]


@pytest.mark.parametrize("end", FINAL)
def test_a_run_whose_flow_has_ended_is_closed(made: Leftovers, end: str) -> None:
    flow_run = flow_run_in(FINAL[end]())
    run = running(made, flow_run)
    before, board = state_of(flow_run), Board(made.store, run)
    made.store.put_bytes(invitation(run), b"{}")
    board.write_order(Instruction(beat=1))
    found = find_orphans()
    assert whats(found) == [("run", run)] and before in found[0].detail
    assert settle(found) == found
    assert (board.order(), list(made.store.list(invitation(run)))) == (None, [])  # nodes must not join it
    assert (mlflow_runs.run_status(run), state_of(flow_run)) == ("KILLED", before)
    assert find_orphans() == []


LIVE = """
import sys
from contextlib import ExitStack
from tasks.orchestration import flow_runs
with ExitStack() as alive:
    for each in sys.argv[1:]:
        flow_runs.flow_run_id = lambda: each
        alive.enter_context(flow_runs.flow_is_alive())
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.long
def test_every_killed_flow_run_of_this_machine_is_crashed_not_only_those_with_an_mlflow_run(
    made: Leftovers, start: Callable[..., subprocess.Popen[str]]
) -> None:
    earlier, later, waiting = flow_run_in(Running()), flow_run_in(Running()), flow_run_in(AwaitingRetry())
    ids = [str(run.id) for run in (earlier, later, waiting)]
    process = start(sys.executable, "-c", LIVE, *ids)
    assert process.stdout and process.stdout.readline() == "held\n"
    assert find_orphans() == []
    process.kill()
    process.wait()
    assert sorted(whats(settle_all())) == sorted(("flow", each) for each in ids[:2])
    assert [state_of(run) for run in (earlier, later, waiting)] == ["Crashed", "Crashed", "AwaitingRetry"]
    assert find_orphans() == []


def test_a_run_whose_flow_is_gone_is_closed(made: Leftovers) -> None:
    run = running(made, uuid4())
    assert whats(settle_all()) == [("run", run)]
    assert mlflow_runs.run_status(run) == "KILLED"


def test_a_run_of_another_prefect_stays_open(made: Leftovers) -> None:
    """Machines can share MLflow and the bucket only; their own Prefects have equal addresses."""
    flow = uuid4()
    run = running(made, flow)
    for address in ("https://other.example", "http://127.0.0.1:4200"):
        mlflow_runs.set_tags(run, {FLOW_RUN_URL: f"{address}/runs/flow-run/{flow}"})
        with temporary_settings({PREFECT_UI_URL: "http://127.0.0.1:4200"}):
            assert settle_all() == []
    mlflow_runs.set_tags(run, {FLOW_RUN_URL: f"https://prefect.example/runs/flow-run/{flow}"})
    with temporary_settings({PREFECT_UI_URL: "https://prefect.example"}):
        assert whats(settle_all()) == [("run", run)]


@pytest.mark.long
@pytest.mark.parametrize("state", OPEN)
def test_a_killed_flow_of_this_machine_is_crashed_or_cancelled_as_asked(
    made: Leftovers, start: Callable[..., subprocess.Popen[str]], state: str
) -> None:
    flow_run = flow_run_in(OPEN[state]())
    run = running(made, flow_run)
    flow = hold(start, run, flow_run.id)
    assert find_orphans() == []
    flow.kill()
    flow.wait()
    found = find_orphans()
    assert whats(found) == [("run", run)] and "killed" in found[0].detail
    assert settle(found) == found
    assert (mlflow_runs.run_status(run), state_of(flow_run)) == (
        "KILLED",
        "Cancelled" if state == "cancelling" else "Crashed",
    )
    assert find_orphans() == []


def test_a_live_process_is_believed_more_than_prefect(
    made: Leftovers, start: Callable[..., subprocess.Popen[str]]
) -> None:
    flow_run = flow_run_in(Cancelled())
    hold(start, running(made, flow_run), flow_run.id)
    assert find_orphans() == []


def test_flows_that_may_be_at_work_elsewhere_are_left_alone(
    made: Leftovers, start: Callable[..., subprocess.Popen[str]]
) -> None:
    running(made, flow_run_in(Running()))  # of which this machine knows nothing
    resumed = running(made, flow_run_in(Running()))
    earlier = hold(start, resumed, uuid4())  # another flow run than the one that MLflow names now
    earlier.kill()
    earlier.wait()
    assert find_orphans() == []


def test_a_flow_that_a_worker_will_take_up_again_is_left_alone(
    made: Leftovers, start: Callable[..., subprocess.Popen[str]]
) -> None:
    flow_run = flow_run_in(AwaitingRetry())
    flow = hold(start, running(made, flow_run), flow_run.id)
    flow.kill()
    flow.wait()
    assert find_orphans() == []


@pytest.mark.parametrize(
    ("written", "silent", "dead"),
    [(1, DEAD_AFTER_SECONDS + 9, True), (1, DEAD_AFTER_SECONDS - 99, False), (-1, 0, False)],
)
def test_without_a_lock_a_job_that_is_silent_for_long_is_dead(
    made: Leftovers, monkeypatch: pytest.MonkeyPatch, written: float, silent: float, dead: bool
) -> None:
    flow_run = flow_run_in(Running())
    assert flow_run.start_time
    run = running(made, flow_run)
    job = Settings().runs / run / "job.json"
    job.parent.mkdir(parents=True)
    job.write_text("{}")
    then = flow_run.start_time.timestamp() + written  # before the flow run began, it was another's
    os.utime(job, (then, then))
    clock = then + (silent or 10 * DEAD_AFTER_SECONDS)
    monkeypatch.setattr(liveness.time, "time", lambda: clock)
    assert whats(find_orphans()) == ([("run", run)] if dead else [])


def test_what_has_been_taken_up_meanwhile_is_not_settled(made: Leftovers) -> None:
    run = running(made, flow_run_in(Failed()))
    found = find_orphans()
    with hold_run_lock(run):
        assert settle(found) == []
        assert mlflow_runs.run_status(run) == "RUNNING"
    mlflow_runs.end_run(run, "FINISHED")
    assert settle(found) == []
    assert mlflow_runs.run_status(run) == "FINISHED"


def test_a_sweep_whose_flow_has_died_is_closed(made: Leftovers) -> None:
    run = mlflow_runs.start_run("leftovers", "sweep", {}, {FLOW_RUN: str(flow_run_in(Failed()).id)})
    made.runs.append(run)
    assert find_orphans() == []
    mlflow_runs.set_tags(run, {SWEEP: run})
    assert whats(settle_all()) == [("run", run)]
    assert mlflow_runs.run_status(run) == "KILLED"


def test_a_sweep_that_is_killed_before_it_has_its_lock_is_closed(
    made: Leftovers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "flow_tags", lambda: {FLOW_RUN: str(flow_run_in(Failed()).id)})

    def killed(run_id: str, note: str) -> None:
        made.runs.append(run_id)
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "hold_run_lock", killed)
    record = SweepRecord.model_construct(
        dataset=DatasetRef(version="0" * 64, name="leftovers"),
        sweep=SweepConfig.model_construct(space={}, trials=2, eta=3, metric="val/accuracy"),
    )
    with pytest.raises(KeyboardInterrupt), sweep._sweep_run(record, None):
        pass
    assert whats(settle_all()) == [("run", made.runs[-1])]


def test_runs_that_are_not_ours_are_left_alone(made: Leftovers) -> None:
    run = mlflow_runs.start_run("leftovers", "foreign", {}, {})
    made.runs.append(run)
    assert find_orphans() == []


def test_two_processes_cannot_go_on_with_one_run(
    made: Leftovers, start: Callable[..., subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "LOCK_WAIT_SECONDS", 0.3)
    first = hold(start, "some-run", "")
    with pytest.raises(UsageError, match="another process"), hold_run_lock("some-run"):
        pass
    first.kill()
    first.wait()
    with hold_run_lock("some-run"):
        pass
    assert not lock_file("some-run").exists()


def test_unfinished_uploads_are_aborted_after_their_grace(made: Leftovers) -> None:
    client = boto3.client("s3")
    upload = client.create_multipart_upload(Bucket="test", Key="raw/large")["UploadId"]
    client.upload_part(Bucket="test", Key="raw/large", UploadId=upload, PartNumber=1, Body=b"x")
    assert find_orphans() == []
    found = find_orphans(NOW)
    assert whats(found) == [("upload", f"raw/large {upload}")]
    assert settle(found, NOW) == found
    assert list(made.store.uploads()) == [] and find_orphans(NOW) == []


def test_checkpoints_without_a_commit_are_deleted_after_their_grace(made: Leftovers) -> None:
    whole = made.run()
    prefix = bucket_layout.checkpoints("r") + "step-00000001/"
    made.put(prefix + STATE, days=2)
    young = made.put(bucket_layout.checkpoints("r") + "step-00000002/" + STATE, days=0.9)
    found = find_orphans()
    assert whats(found) == [("checkpoint", prefix)]
    assert settle(found) == found
    assert made.there(bucket_layout.checkpoints("r")) == {young}
    assert bucket_layout.checkpoints(whole) + "step-00000007/" + COMMIT in made.there("runs/")


def test_a_step_that_a_resumed_training_has_stored_meanwhile_is_kept(made: Leftovers) -> None:
    prefixes = [f"{bucket_layout.checkpoints(run)}step-00000001/" for run in ("committed", "stored", "held", "dead")]
    for prefix in prefixes:
        made.put(prefix + STATE, days=2)
    found = find_orphans()
    assert whats(found) == [("checkpoint", prefix) for prefix in sorted(prefixes)]
    young = datetime.now(UTC) - timedelta(days=1)
    made.put(prefixes[0] + COMMIT, days=0)
    made.put(prefixes[1] + STATE, days=0)
    with hold_run_lock("held"):
        assert [_delete_checkpoint(made.store, prefix, young) for prefix in prefixes] == [False, False, False, True]
    assert made.there("runs/") == {prefixes[0] + COMMIT, *(prefix + STATE for prefix in prefixes[:3])}


def test_aliases_that_do_not_follow_their_history_are_repaired(made: Leftovers) -> None:
    run = made.run()
    first = made.version(run, "0" * 64)
    promote(made.store, first, after=None)
    second = made.version(run, "0" * 64, first.name)
    assert find_orphans() == []
    set_alias(second, "champion")
    found = find_orphans()
    assert whats(found) == [("alias", first.name)] and "champion: 2 → 1" in found[0].detail
    assert settle(found) == found
    assert aliased(first.name, "champion") == first and find_orphans() == []


def test_half_written_files_are_removed_unless_somebody_writes_them(made: Leftovers) -> None:
    work = Settings().home / "work"
    for step in ("preprocess-dead", "preprocess-live"):
        (work / step).mkdir(parents=True)
        (work / step / "shard").write_bytes(b"x")
    with locked(Settings().cache / "locks" / "preprocess-live"):
        found = find_orphans()
        assert whats(found) == [("files", str(work / "preprocess-dead"))]
        assert settle(found) == found
    assert [folder.name for folder in work.iterdir()] == ["preprocess-live"]


@pytest.mark.parametrize(
    ("module", "name"), [("tasks.training.supervisor", "python"), ("tasks.training.torchrun", "rank-1")]
)
def test_processes_without_their_flow_are_ended(
    made: Leftovers, start: Callable[..., subprocess.Popen[str]], module: str, name: str
) -> None:
    folder = Settings().runs / "some-run"
    flow = hold(start, "some-run", "a flow run")
    # What runs does not matter, only what it is called, and who its parent is.
    code = f"from infra.machine.lifeline import name_process; name_process('{name}'); print('!', flush=True); input()"
    process = start(sys.executable, "-c", code, "-m", module, str(folder))
    other = start(sys.executable, "-c", code, "-m", module, str(folder.parents[2] / "runs" / "some-run"))  # another's
    for each in (process, other):
        assert each.stdout and each.stdout.readline()
    if module == "tasks.training.supervisor":
        assert find_orphans() == []
        flow.kill()
        flow.wait()
    found = find_orphans()
    assert whats(found) == [("process", str(process.pid))]
    assert settle(found) == found
    assert not psutil.pid_exists(process.pid) and other.poll() is None


def test_a_live_supervisor_keeps_its_run_alive(made: Leftovers, start: Callable[..., subprocess.Popen[str]]) -> None:
    run = running(made, flow_run_in(Failed()))
    folder = str(Settings().runs / run)
    start(sys.executable, "-c", "import time; time.sleep(300)", "-m", "tasks.training.supervisor", folder)
    assert find_orphans() == []
    assert MlflowClient().get_run(run).info.status == "RUNNING"
