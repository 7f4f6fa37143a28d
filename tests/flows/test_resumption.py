"""Trainings of deployments that die go on by themselves: the decision, and a real worker whose flow run is killed."""

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psutil
import pytest
import yaml
from mlflow import MlflowClient
from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterId
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.states import Cancelled, Cancelling, Completed, Crashed, Failed, Paused, Pending, Running, Scheduled

from flows import resumption
from flows.activity import activities, publish
from flows.deployed_runs import cancel
from flows.resumption import Decision, Sweep, decide, tries_from
from infra.errors import ServiceError
from infra.settings import Settings
from infra.tracking import mlflow_runs
from infra.tracking.provenance import COMMIT_VARIABLE
from infra.tracking.tags import (
    ALIVE,
    COMMIT,
    FLOW_RUN,
    MANIFEST_DIGEST,
    MLFLOW_RUN,
    RESUMABLE,
    RESUMED_BY,
    RESUMED_STEP,
    RESUMED_TRIES,
    RESUMES,
    STARTED_BY,
)
from tasks.orchestration.flow_runs import may_go_on, training_flow_runs
from tests.flows import program as training_program
from tests.flows.conftest import Convoy
from tests.flows.program import NextTraining, Program, assert_as_undisturbed, running_worker, sets, wait_for

DEPLOYED = uuid4()
SETTINGS = training_program.RESUMABLE


def flow_run(state: Any, labels: dict[str, Any] | None = None, deployment: UUID | None = DEPLOYED) -> FlowRun:
    return FlowRun(flow_id=uuid4(), state=state, state_type=state.type, deployment_id=deployment, labels=labels or {})


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (flow_run(Crashed()), True),
        (flow_run(Failed(), {RESUMABLE: "MLflow is down"}), True),
        (flow_run(Crashed(), deployment=None), False),
        (flow_run(Crashed(), {RESUMED_BY: str(uuid4())}), False),
        (flow_run(Crashed(), {RESUMED_BY: "none: cancelled"}), False),
        (flow_run(Failed()), False),
        (flow_run(Failed(name="Refused")), False),
        (flow_run(Cancelled()), False),
        (flow_run(Cancelled(), {RESUMABLE: "MLflow is down"}), False),
        (flow_run(Completed()), False),
        (flow_run(Running(), {RESUMABLE: "MLflow is down"}), False),
    ],
)
def test_only_what_ended_without_its_own_word_goes_on(run: FlowRun, expected: bool) -> None:
    assert may_go_on(run) is expected
    assert decide(run, 0, 3) == ("resume" if expected else "leave")


@pytest.mark.parametrize(
    ("labels", "committed", "limit", "expected"),
    [
        ({}, 0, 1, "resume"),
        ({}, 0, 0, "give up"),
        ({RESUMED_STEP: 0, RESUMED_TRIES: 1}, 0, 1, "give up"),
        ({RESUMED_STEP: 0, RESUMED_TRIES: 1}, 0, 2, "resume"),
        ({RESUMED_STEP: 0, RESUMED_TRIES: 3}, 40, 3, "resume"),
        ({RESUMED_STEP: 40, RESUMED_TRIES: 3}, 40, 3, "give up"),
        ({RESUMED_STEP: 40, RESUMED_TRIES: 2}, 40, 3, "resume"),
    ],
)
def test_it_is_given_up_once_so_many_resumptions_have_brought_no_newer_checkpoint(
    labels: dict[str, Any], committed: int, limit: int, expected: Decision
) -> None:
    assert decide(flow_run(Crashed(), labels), committed, limit) == expected


def test_resumptions_are_counted_from_one_step() -> None:
    assert tries_from({}, 0) == 0
    assert tries_from({RESUMED_STEP: 0, RESUMED_TRIES: 2}, 0) == 2
    assert tries_from({RESUMED_STEP: 0, RESUMED_TRIES: 2}, 12) == 0


POOL = "resumption-pool"


@pytest.fixture(scope="module")
def deployed(stack: object, quiet_prefect: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Deploys a training of digits; returns the deployment's name."""
    from flows.deployments import deploy

    def make(
        name: str, flow: str = "flows.retrain.retrain_flow", pool: str = POOL, of: str | None = None, **config: Any
    ) -> str:
        values: dict[str, Any] = {"dataset": "digits", "name": of or name, "ranks": 2}
        for setting in SETTINGS:
            key, _, value = setting.partition("=")
            section, _, last = key.rpartition(".")
            place = values.setdefault(section, {}) if section else values
            place[last] = yaml.safe_load(value)
        entry = {
            "name": name,
            "entrypoint": flow,
            "parameters": {"config": values | {"promote": True, **config}},
            "work_pool": {"name": pool},
        }
        file = tmp_path_factory.mktemp("deployed") / "prefect.yaml"
        file.write_text(yaml.safe_dump({"name": "convoy", "pull": [], "deployments": [entry]}))
        list(deploy(file))
        return f"retrain/{name}"

    return make


@pytest.fixture(scope="module")
def unserved(deployed: Callable[..., str]) -> str:
    """A deployment that no worker serves."""
    return deployed("unserved", resume={"limit": 1})


@pytest.fixture
def start_worker(stack: object, tmp_path: Path) -> Iterator[Callable[..., "subprocess.Popen[bytes]"]]:
    """Starts workers that look after trainings every second; they have one log in the test's folder."""
    with ExitStack() as started:

        def start(pool: str = POOL, **variables: str) -> "subprocess.Popen[bytes]":
            return started.enter_context(running_worker(tmp_path, pool, CONVOY_SWEEP_SECONDS="1", **variables))

        yield start


def run_of(flow_run_id: str) -> FlowRun:
    with get_client(sync_client=True) as client:
        return client.read_flow_run(UUID(flow_run_id))


def resumption_of(flow_run_id: str) -> str:
    """Waits until a worker has resumed a flow run; returns the new one's id."""
    return str(wait_for(lambda: run_of(flow_run_id).labels.get(RESUMED_BY), "the resumption"))


def flow_process() -> psutil.Process:
    """The process of the only flow run of a worker."""
    (found,) = [
        process
        for process in psutil.process_iter()
        if "prefect.engine" in _command(process) and _home(process) == os.environ["CONVOY_HOME"]
    ]
    return found


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _home(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("CONVOY_HOME")
    except psutil.Error:
        return None


@pytest.fixture
def new_run(unserved: str) -> Callable[..., str]:
    """Makes a flow run of a deployment that no worker serves; returns its id."""

    def make(state: State[Any], labels: dict[str, Any] | None = None) -> str:
        with get_client(sync_client=True) as client:
            found = client.read_deployment_by_name(unserved)
            made = client.create_flow_run_from_deployment(found.id, labels=labels or {})
            client.set_flow_run_state(made.id, state, force=True)
        return str(made.id)

    return make


@pytest.mark.long
def test_a_dead_flow_run_is_resumed_once_whoever_looks_and_given_up_after_its_limit(
    new_run: Callable[..., str], convoy: Convoy
) -> None:
    died = new_run(Crashed(message="its process was killed"), {STARTED_BY: "CI"})
    said: list[str] = []
    for _ in range(2):
        Sweep(POOL, "platform-test", said.append)()
    (second,) = [run for run in resumptions() if run.labels.get(RESUMES) == died]
    assert run_of(died).labels[RESUMED_BY] == str(second.id)
    assert second.idempotency_key == f"resume-{died}"
    assert second.parameters == run_of(died).parameters
    assert (second.labels[RESUMED_STEP], second.labels[RESUMED_TRIES], second.labels[STARTED_BY]) == (0, 1, "CI")
    assert len([line for line in said if "goes on from the beginning" in line]) == 1

    with get_client(sync_client=True) as client:
        client.set_flow_run_state(second.id, Crashed(message="again"), force=True)
    Sweep(POOL, "platform-test", said.append)()
    assert run_of(str(second.id)).labels[RESUMED_BY] == "none: it has ended 2 times in a row at step 0"
    assert not [run for run in resumptions() if run.labels.get(RESUMES) == str(second.id)]
    shown = json.loads(convoy("status", "--work", "--json").stdout)
    (row,) = [each for each in shown if each["flow_run_id"] == str(second.id)]
    assert (row["kind"], row["detail"][:50]) == ("died", "not resumed: it has ended 2 times in a row at step")


@pytest.mark.long
def test_a_training_by_commit_goes_on_with_a_worker_of_its_kind(new_run: Callable[..., str]) -> None:
    """On another kind of processor its weights would differ, and the resumption would fail for good."""
    commit = "c" * 40
    died = new_run(Crashed(), {COMMIT: commit})
    parameters = {**run_of(died).parameters, "resume": "a" * 32}
    with get_client(sync_client=True) as client:
        Sweep(POOL, "platform-test", print)._resume(client, run_of(died), parameters, step=3, tries=1)
    (again,) = [run for run in resumptions() if run.labels.get(RESUMES) == died]
    assert (again.work_queue_name, again.parameters["resume"]) == ("platform-test", "a" * 32)
    assert again.job_variables == {"env": {COMMIT_VARIABLE: commit}}


def test_whether_it_can_go_on_here_is_looked_at_in_the_project(
    stack: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONVOY_PROJECT", str(tmp_path))
    monkeypatch.setattr(resumption, "CHECK", "import json, os; print(json.dumps([os.getcwd()]))")
    assert resumption._differences("a" * 32, code=True) == str(tmp_path)
    monkeypatch.setattr(resumption, "CHECK", "import time; time.sleep(60)")
    monkeypatch.setattr(resumption, "CHECK_SECONDS", 0.5)
    with pytest.raises(ServiceError, match=r"the check has not ended after 0.5 s"):
        resumption._differences("a" * 32, code=True)


@pytest.mark.long
def test_two_workers_that_look_at_the_same_moment_make_one_resumption(new_run: Callable[..., str]) -> None:
    died = new_run(Crashed())
    with ThreadPoolExecutor(4) as pool:
        for each in [pool.submit(Sweep(POOL, "platform-test", print)) for _ in range(4)]:
            each.result()
    assert len([run for run in resumptions() if run.labels.get(RESUMES) == died]) == 1


def test_a_person_can_cancel_what_has_died(new_run: Callable[..., str], convoy: Convoy) -> None:
    died = new_run(Crashed())
    done = convoy("cancel", died)
    assert (done.status, "and no worker resumes it" in done.stdout) == (0, True), done.stderr
    Sweep(POOL, "platform-test", print)()
    assert not [run for run in resumptions() if run.labels.get(RESUMES) == died]


@pytest.mark.long
def test_a_flow_run_elsewhere_counts_as_dead_once_its_sign_of_life_has_not_changed_for_long(
    new_run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    silent, alive, older = new_run(Running(), {ALIVE: "1"}), new_run(Running(), {ALIVE: "1"}), new_run(Running())
    taken = new_run(Pending())
    sweep = Sweep(POOL, "platform-test", print)
    sweep()
    assert {run_of(each).state_type for each in (silent, alive, older)} == {StateType.RUNNING}
    with get_client(sync_client=True) as client:
        client.update_flow_run_labels(UUID(alive), {ALIVE: "2"})
    monkeypatch.setattr("flows.resumption.SILENCE_SECONDS", 0.0)
    sweep()
    assert run_of(silent).state_type == StateType.CRASHED
    assert "no sign of life" in (run_of(silent).state.message or "")  # type: ignore[union-attr]
    assert {run_of(each).state_type for each in (alive, older)} == {StateType.RUNNING}
    assert run_of(taken).state_type == StateType.PENDING
    assert [run.labels[RESUMES] for run in resumptions() if run.labels.get(RESUMES) in (silent, alive, older)] == [
        silent
    ]
    with get_client(sync_client=True) as client:
        client.update_flow_run_labels(UUID(alive), {ALIVE: "3"})
    monkeypatch.setattr("flows.resumption.PENDING_SECONDS", 0.0)
    sweep()
    assert run_of(taken).state_type == StateType.CRASHED
    assert run_of(alive).state_type == StateType.RUNNING


@pytest.mark.long
def test_one_that_cannot_be_looked_at_holds_up_no_other(
    new_run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a network of one's own could not be loaded here."""
    faulty, died = new_run(Crashed()), new_run(Crashed())
    look_at, said = Sweep._look_at, list[str]()

    def looked_at(sweep: Sweep, client: SyncPrefectClient, run: FlowRun) -> None:
        if str(run.id) == faulty:
            raise ServiceError("there is no module nets")
        look_at(sweep, client, run)

    monkeypatch.setattr(Sweep, "_look_at", looked_at)
    sweep = Sweep(POOL, "platform-test", said.append)
    sweep()
    assert [run.labels[RESUMES] for run in resumptions() if run.labels.get(RESUMES) in (faulty, died)] == [died]
    assert sweep._page
    assert sum("cannot go on here for now: there is no module nets" in line for line in said) == 1
    with get_client(sync_client=True) as client:
        client.delete_artifact(sweep._page)
    sweep()
    sweep()
    assert sweep._page


@pytest.mark.long
def test_one_that_waited_for_long_before_it_died_is_resumed_too(unserved: str) -> None:
    began = datetime.now(UTC) - timedelta(days=30)
    with get_client(sync_client=True) as client:
        found = client.read_deployment_by_name(unserved)
        made = client.create_flow_run_from_deployment(found.id, state=Scheduled(scheduled_time=began))
        for state in (Pending(), Running(), Crashed()):
            client.set_flow_run_state(made.id, state, force=True)
    Sweep(POOL, "platform-test", print)()
    assert run_of(str(made.id)).labels[RESUMED_BY]


def test_a_flow_run_that_judged_an_earlier_version_again_is_repeated_as_it_was_asked_for(
    new_run: Callable[..., str],
) -> None:
    died = new_run(Crashed())
    earlier = mlflow_runs.start_run("resumption", "earlier", {}, {FLOW_RUN: died})
    mlflow_runs.end_run(earlier, "FINISHED")
    Sweep(POOL, "platform-test", print)()
    (again,) = [run for run in resumptions() if run.labels.get(RESUMES) == died]
    assert again.parameters == run_of(died).parameters


@pytest.mark.long
def test_the_mlflow_run_of_a_flow_run_that_prefect_has_killed_is_closed_unless_another_one_works_on_it(
    new_run: Callable[..., str],
) -> None:
    """Prefect kills a flow run that does not end in time after it was cancelled, and tells MLflow nothing."""
    flows = [new_run(Cancelled()) for _ in range(3)]
    workers = flows[0], str(uuid4()), flows[2]  # which the MLflow runs name
    runs = [
        mlflow_runs.start_run("resumption", "cancelled", {}, {FLOW_RUN: each, MANIFEST_DIGEST: "d" * 64})
        for each in workers
    ]
    MlflowClient().delete_run(runs[2])  # a person did, and MLflow refuses to close it
    locks = [Settings().home / "flows" / each for each in flows]
    with get_client(sync_client=True) as client:
        for flow, run, lock in zip(flows, runs, locks, strict=True):
            client.update_flow_run_labels(UUID(flow), {MLFLOW_RUN: run})
            lock.parent.mkdir(parents=True, exist_ok=True)
            lock.touch()  # as a killed process leaves it
    said: list[str] = []
    sweep = Sweep(POOL, "platform-test", said.append)
    for _ in range(2):
        sweep()
        assert [mlflow_runs.run_status(each) for each in runs] == ["KILLED", "RUNNING", "RUNNING"]
        assert [lock.exists() for lock in locks] == [False, False, True]
    assert sweep._page  # the round went on to its end
    assert len([line for line in said if "cannot close the MLflow run" in line]) == 1
    assert [run_of(each).state_name for each in flows] == ["Cancelled"] * 3
    mlflow_runs.end_run(runs[1], "KILLED")
    locks[2].unlink()


def test_a_cancelled_flow_run_that_is_killed_stays_cancelled(new_run: Callable[..., str]) -> None:
    cancelled = new_run(Cancelling())
    lock = Settings().home / "flows" / cancelled
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()
    Sweep(POOL, "platform-test", print)()
    assert run_of(cancelled).state_name == "Cancelled"
    assert not [run for run in resumptions() if run.labels.get(RESUMES) == cancelled]


def test_one_that_a_person_cancels_while_a_worker_looks_at_it_is_not_resumed(new_run: Callable[..., str]) -> None:
    died = new_run(Crashed())
    before = run_of(died)
    cancel(died)
    with get_client(sync_client=True) as client:
        Sweep(POOL, "platform-test", print)._look_at(client, before)
    assert not [run for run in resumptions() if run.labels.get(RESUMES) == died]


def test_a_resumption_that_has_not_begun_is_cancelled_by_what_it_resumes(new_run: Callable[..., str]) -> None:
    died = new_run(Crashed())
    Sweep(POOL, "platform-test", print)()
    cancel(died)
    (second,) = [run for run in resumptions() if run.labels.get(RESUMES) == died]
    assert second.state_name == "Cancelled"


def test_work_is_shown_as_a_page_and_by_the_command(new_run: Callable[..., str], convoy: Convoy) -> None:
    paused = new_run(Paused())
    waiting = new_run(Scheduled())
    found = {str(each.flow_run_id): each for each in activities()}
    assert re.fullmatch(r"waits for a person's approval \(\d+ s\)", found[paused].detail)
    assert (found[waiting].kind, found[waiting].detail[:24]) == ("waiting", "waits for a worker, in q")
    page = publish(list(found.values()), None)
    assert publish(activities(), page) == page
    with get_client(sync_client=True) as client:
        (artifact,) = client.read_artifacts(artifact_filter=ArtifactFilter(id=ArtifactFilterId(any_=[page])))
    assert "waits for a person's approval" in str(artifact.data)
    done = convoy("status")
    assert "waits for a person's approval" in done.stdout
    assert done.stdout.startswith("seaweedfs  ")


def resumptions() -> list[FlowRun]:
    with get_client(sync_client=True) as client:
        return [run for run in training_flow_runs(client, list(StateType)) if RESUMES in run.labels]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("by_commit", [False, True], ids=["installed code", "code of a commit"])
def test_a_training_whose_flow_is_killed_and_whose_worker_is_stopped_ends_as_if_undisturbed(
    by_commit: bool,
    deployed: Callable[..., str],
    start_worker: Callable[[], "subprocess.Popen[bytes]"],
    settings: Settings,
    program: Callable[..., Program],
    convoy: Convoy,
    tmp_path: Path,
) -> None:
    from flows.summary import Summary

    code: tuple[str, ...] = ()
    if by_commit:
        bare = str(tmp_path / "convoy.git")
        subprocess.run(["git", "clone", "--quiet", "--bare", str(Path(__file__).parents[2]), bare], check=True)
        code = ("--commit", "HEAD", "--repository", bare)
    undisturbed = tmp_path / "undisturbed.json"
    done = program(
        "train",
        "--dataset",
        "digits",
        "--ranks",
        "1",
        *sets(*SETTINGS),
        "--name",
        "calm",
        "--summary",
        str(undisturbed),
    ).wait()
    assert done.status == 0, done.stderr

    name = deployed(f"resumed-{len(code)}")
    worker = start_worker()
    next_training = NextTraining(settings)
    asked = program("retrain", "-d", name, "--wait", "--json", *code)
    training = next_training.under_way()
    first = wait_for(lambda: _flow_run_of(training.run_id), "the flow run")
    training.comes_to(20)
    flow_process().kill()
    second = resumption_of(first)
    training.assert_ends()
    training.comes_to(60)
    worker.send_signal(signal.SIGTERM)
    worker.wait(60)
    training.assert_ends()
    start_worker()
    third = resumption_of(second)

    done = asked.wait(300)
    assert done.status == 0, done.stderr
    found = Summary.model_validate_json(done.stdout)
    assert found.prefect_flow_run_id == third
    assert found.mlflow_run_id == training.run_id
    assert_as_undisturbed(found, Summary.model_validate_json(undisturbed.read_text()))
    assert [run_of(each).state_type for each in (first, second, third)] == [
        StateType.CRASHED,
        StateType.CRASHED,
        StateType.COMPLETED,
    ]
    labels = run_of(third).labels
    assert (labels[RESUMES], labels[RESUMED_TRIES], labels[MLFLOW_RUN]) == (second, 1, training.run_id)
    assert "(resumed by hand)" in run_of(third).name
    assert len({run_of(each).labels.get(COMMIT) for each in (first, second, third)}) == 1
    assert (COMMIT in labels, ALIVE in labels) == (by_commit, True)

    next_training = NextTraining(settings)
    asked = program("retrain", "-d", name, "--force", "--wait", *sets("epochs=100000"), *code)
    training = next_training.under_way()
    assert convoy("cancel", training.run_id).status == 0
    assert asked.wait().status == 75
    training.assert_ends()
    cancelled = run_of(str(_flow_run_of(training.run_id)))
    assert (cancelled.state_type, may_go_on(cancelled)) == (StateType.CANCELLED, False)


def _flow_run_of(mlflow_run: str) -> str | None:
    from infra.tracking import mlflow_runs
    from infra.tracking.tags import FLOW_RUN

    return mlflow_runs.run_tags(mlflow_run).get(FLOW_RUN)
