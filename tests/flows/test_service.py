"""Convoy as a service: deployments, a real worker, requested runs, events and cancellations."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml
from mlflow.tracking import MlflowClient
from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.events.schemas.automations import Automation
from prefect.exceptions import ObjectNotFound

from flows.cli import service
from infra.errors import ServiceError
from tests.flows.conftest import Convoy
from tests.flows.program import NextTraining, running_worker, wait_for

MODEL = "served-digits"
CONFIG = {
    "dataset": "digits",
    "name": MODEL,
    "ranks": 1,
    "epochs": 4,
    "batch_size": 60,
    "network": {"width": 4},
    "data": {"limit": 600},
    "augment": {"shift": 0},
    "serving": {"http": False},
    "promote": True,
}
GOOD = "deployments: [{name: a, entrypoint: flows.train.train_flow, work_pool: {name: p}}]"


def written(file: Path, **changes: object) -> Path:
    """A file with one deployment of `retrain`, on a pool of its own."""
    deployment = {
        "name": MODEL,
        "entrypoint": "flows.retrain.retrain_flow",
        "parameters": {"config": CONFIG},
        "work_pool": {"name": "test-pool"},
        "schedules": [
            {"slug": "nightly", "cron": "0 3 * * *", "timezone": "Europe/Berlin"},
            {"slug": "noon", "cron": "0 12 * * *", "timezone": "UTC"},
        ],
        "triggers": [
            {
                "type": "event",
                "expect": ["convoy.data.changed"],
                "match": {"prefect.resource.id": f"convoy.dataset.{MODEL}"},
            }
        ],
        **changes,
    }
    file.write_text(yaml.safe_dump({"name": "convoy", "pull": [], "deployments": [deployment]}))
    return file


SHARED = """
name: convoy
pull: []
deployments:
- &first
  name: shared-first
  entrypoint: flows.retrain.retrain_flow
  parameters: {config: {dataset: digits}}
  work_pool: {name: unserved-pool}
  schedules: &nightly [{slug: nightly, cron: 0 3 * * *}]
  triggers: [{type: event, name: Shared, expect: [a]}, {type: event, expect: [b]}, {type: event, expect: [c]}]
- {<<: *first, name: shared-second, schedules: *nightly}
- {<<: *first, name: shared-third, schedules: , triggers: }
"""


def registered() -> DeploymentResponse:
    with get_client(sync_client=True) as client:
        return client.read_deployment_by_name(f"retrain/{MODEL}")


def runs() -> list[FlowRun]:
    with get_client(sync_client=True) as client:
        only = DeploymentFilter(id=DeploymentFilterId(any_=[registered().id]))
        return [run for run in client.read_flow_runs(deployment_filter=only) if not run.auto_scheduled]


def final_state(flow_run: UUID) -> State[Any] | None:
    with get_client(sync_client=True) as client:
        found = client.read_flow_run(flow_run).state
    return found if found and found.is_final() else None


@pytest.fixture(scope="module")
def deployed(stack: object, quiet_prefect: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from flows.deployments import deploy

    file = written(tmp_path_factory.mktemp("deployments") / "prefect.yaml")
    assert list(deploy(file)) == [f"retrain/{MODEL}  at 0 3 * * * Europe/Berlin (on), 0 12 * * * UTC (on)"]
    return file


@pytest.fixture(scope="module")
def worker(deployed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[bytes]]:
    with running_worker(tmp_path_factory.mktemp("worker"), "test-pool") as worker:
        yield worker


@pytest.mark.slow
def test_deploying_again_changes_nothing_and_a_schedule_that_left_is_deleted(deployed: Path, tmp_path: Path) -> None:
    from flows.deployments import deploy

    before = registered()
    list(deploy(deployed))
    again = registered()
    same = ("id", "version", "parameters", "tags", "entrypoint", "concurrency_limit")
    assert [getattr(again, name) for name in same] == [getattr(before, name) for name in same]
    schedules = {schedule.slug: schedule.id for schedule in before.schedules}
    assert {schedule.slug: schedule.id for schedule in again.schedules} == schedules
    assert schedules.keys() == {"nightly", "noon"}

    limited = written(tmp_path / "limited.yaml", concurrency_limit={"limit": 1, "collision_strategy": "ENQUEUE"})
    list(deploy(limited))
    assert registered().global_concurrency_limit
    list(deploy(deployed))
    assert registered().global_concurrency_limit is None

    left = written(tmp_path / "prefect.yaml", schedules=[{"slug": "noon", "cron": "0 13 * * *", "timezone": "UTC"}])
    list(deploy(left))
    (schedule,) = registered().schedules
    assert (schedule.slug, schedule.id) == ("noon", schedules["noon"])
    assert schedule.schedule.cron == "0 13 * * *"  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_schedule_is_on_or_off_as_asked_then_as_it_was_then_as_the_file_says(deployed: Path, tmp_path: Path) -> None:
    from flows.deployments import deploy

    noon = {"slug": "noon", "cron": "0 12 * * *", "timezone": "UTC"}
    evening = {"slug": "evening", "cron": "0 18 * * *", "timezone": "UTC", "active": False}
    file = written(tmp_path / "prefect.yaml", schedules=[noon, evening])
    try:
        for switch, told in (
            (None, "0 12 * * * UTC (on), 0 18 * * * UTC (off)"),  # noon was deployed before, evening is new
            (True, "0 12 * * * UTC (on), 0 18 * * * UTC (on)"),
            (None, "0 12 * * * UTC (on), 0 18 * * * UTC (on)"),
            (False, "0 12 * * * UTC (off), 0 18 * * * UTC (off)"),
            (None, "0 12 * * * UTC (off), 0 18 * * * UTC (off)"),
        ):
            assert list(deploy(file, switch)) == [f"retrain/{MODEL}  at {told}"]
            active = {schedule.slug: schedule.active for schedule in registered().schedules}
            assert active == {"noon": "12 * * * UTC (on)" in told, "evening": "18 * * * UTC (on)" in told}
    finally:
        list(deploy(deployed, switch=True))


@pytest.mark.slow
def test_the_example_switches_no_schedule_on_and_says_how(convoy: Convoy, stack: object, quiet_prefect: None) -> None:
    done = convoy("deploy")
    assert done.status == 0
    assert "at 0 3 * * * UTC (off)" in done.stdout
    assert "(on)" not in done.stdout
    hint = "Schedules that are off start nothing; `convoy deploy --schedules` switches them on."
    assert done.stderr.splitlines()[-1] == hint


@pytest.mark.slow
def test_a_request_without_a_worker_says_how_to_start_one(stack: object, quiet_prefect: None, tmp_path: Path) -> None:
    from flows.deployed_runs import cancel, follow, start_retraining
    from flows.deployments import deploy

    list(deploy(written(tmp_path / "prefect.yaml", name="nobodys", work_pool={"name": "idle-pool"}, schedules=[])))
    started = start_retraining("nobodys", [], force=True)
    said: list[str] = []

    def report(line: str) -> None:
        said.append(line)
        if "no worker" in line:
            cancel(str(started.id))

    summary, _ = follow(started.id, report)
    assert summary.exit_status == 75
    assert "no worker of the pool idle-pool is online: `convoy worker --pool idle-pool` starts one here" in said


@pytest.mark.slow
def test_a_deployment_with_another_name_takes_the_place_of_the_one_that_convoy_made_before(
    convoy: Convoy, stack: object, quiet_prefect: None, tmp_path: Path
) -> None:
    """A deployment of the older name that is not Convoy's stays as it is."""

    def file(name: str, **more: object) -> Path:
        of_pool = {"work_pool": {"name": "unserved-pool"}}
        return written(tmp_path / "prefect.yaml", name=name, **of_pool, **more)

    def read(name: str) -> DeploymentResponse:
        with get_client(sync_client=True) as client:
            return client.read_deployment_by_name(f"retrain/{name}")

    def deploys(path: Path) -> list[str]:
        done = convoy("deploy", "--file", str(path))
        assert done.status == 0, done.stderr
        return done.stdout.splitlines()

    def triggers(name: str) -> list[Automation]:
        with get_client(sync_client=True) as client:
            return client.read_resource_related_automations(f"prefect.deployment.{read(name).id}")

    nightly, noon = yaml.safe_load(file("not-ours").read_text())["deployments"][0]["schedules"]
    deploys(file("not-ours"))
    deploys(file("before", tags=["convoy", "cats"], schedules=[nightly, noon | {"active": False}]))
    (trigger,) = triggers("before")
    with get_client(sync_client=True) as client:
        client.pause_automation(trigger.id)
    new = file("cats", tags=["convoy", "cats"], older_names=["before", "not-ours", "never"])
    first, *others = deploys(new)
    assert first.startswith("retrain/cats  at ")
    assert others == ["retrain/before  is now retrain/cats; its schedules and triggers are off"]
    assert len(deploys(new)) == 1  # a second call changes nothing
    assert [schedule.active for schedule in read("before").schedules] == [False, False]
    assert triggers("before") == []
    assert read("before").description == "An older name of retrain/cats, kept for scripts."
    for name, noon_is_on in (("cats", False), ("not-ours", True)):  # the new name goes on as the older one was
        active = {schedule.slug: schedule.active for schedule in read(name).schedules}
        assert active == {"nightly": True, "noon": noon_is_on}
        assert [each.enabled for each in triggers(name)] == [name != "cats"]

    deploys(file("before", tags=["convoy", "cats"], older_names=["cats"]))  # and back again
    active = {schedule.slug: schedule.active for schedule in read("before").schedules}
    assert active == {"nightly": True, "noon": False}
    assert [schedule.active for schedule in read("cats").schedules] == [False, False]
    assert [each.enabled for each in triggers("before")] == [False]
    deploys(file("cats", tags=["convoy", "cats"], older_names=["before"]))
    deploys(file("before", tags=["convoy", "cats"]))  # from an older state of the project
    assert [schedule.active for schedule in read("before").schedules] == [False, False]
    deploys(file("cats", tags=["convoy", "cats"], older_names=["before"]))

    for name in ("before", "retrain/before", "cats"):  # both names work in scripts
        done = convoy("retrain", "-d", name, "--json")
        assert done.status == 0, done.stderr
        with get_client(sync_client=True) as client:
            run = client.read_flow_run(UUID(json.loads(done.stdout)["prefect_flow_run_id"]))
        assert run.deployment_id == read("cats").id


@pytest.mark.long
def test_a_deployment_that_breaks_off_leaves_a_schedule_on(
    deployed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Prefect has taken some of the deployments, and the file says that a new schedule is off."""
    from flows import deployments

    really = subprocess.run

    def break_off(*arguments: Any, **options: Any) -> "subprocess.CompletedProcess[str]":
        done = really(*arguments, **options)
        return subprocess.CompletedProcess(done.args, 1, "", "the next one is wrong")

    entry = yaml.safe_load(deployed.read_text())["deployments"][0]
    off = written(tmp_path / "off.yaml", schedules=[each | {"active": False} for each in entry["schedules"]])
    monkeypatch.setattr(deployments.subprocess, "run", break_off)
    with pytest.raises(ServiceError, match="the next one is wrong"):
        list(deployments.deploy(off))
    assert {schedule.slug: schedule.active for schedule in registered().schedules} == {"nightly": True, "noon": True}


@pytest.mark.long
def test_deployments_that_share_schedules_and_triggers_in_their_file_keep_their_own_states(
    stack: object, quiet_prefect: None, tmp_path: Path
) -> None:
    from flows.deployments import deploy

    def triggers(deployment: UUID) -> dict[str, bool]:
        with get_client(sync_client=True) as client:
            found = client.read_resource_related_automations(f"prefect.deployment.{deployment}")
        assert len(found) == 3
        return {each.name: each.enabled for each in found}

    file = tmp_path / "prefect.yaml"
    file.write_text(SHARED)
    list(deploy(file))
    with get_client(sync_client=True) as client:
        first, second = (client.read_deployment_by_name(f"retrain/shared-{each}") for each in ("first", "second"))
        client.update_deployment_schedule(first.id, first.schedules[0].id, active=False)
        for each in client.read_resource_related_automations(f"prefect.deployment.{first.id}"):
            if each.name in ("Shared", "shared-first__automation_2"):
                client.pause_automation(each.id)
    told = list(deploy(file))
    assert ["(off)" in line for line in told] == [True, False, False]
    with get_client(sync_client=True) as client:
        found = [client.read_deployment(each.id).schedules[0].active for each in (first, second)]
    assert found == [False, True]
    assert triggers(first.id) == {
        "Shared": False,
        "shared-first__automation_2": False,
        "shared-first__automation_3": True,
    }
    assert set(triggers(second.id).values()) == {True}


def test_the_deployments_that_come_with_convoy_are_whole() -> None:
    from prefect.flows import load_flow_from_entrypoint

    from flows.deployments import DEPLOYMENTS

    entries = yaml.safe_load(DEPLOYMENTS.read_text())["deployments"]
    flows = {entry["entrypoint"]: load_flow_from_entrypoint(entry["entrypoint"]) for entry in entries}
    assert len({entry["name"] for entry in entries}) == len(entries)  # Prefect's list shows this name first
    assert all(each["description"] for entry in entries for each in (entry, *entry.get("triggers", ())))
    assert {flow.name for flow in flows.values()} == {"retrain", "train", "predict", "prune", "trial", "judge"}
    for entry in entries:
        if "schedules" in entry:  # without a person who fills in a form
            wanted = set(flows[entry["entrypoint"]].parameters.required or ())
            assert wanted <= entry.get("parameters", {}).keys()


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        ("", "deployments: field required"),
        ("just text", "deployments: field required"),
        ("deployments: a", "deployments: give a list, such as ['a']"),
        (b"\x80", "is no file of deployments"),
        (GOOD.replace("work_pool", "pool"), "deployments.0.work_pool: field required"),
        (GOOD.replace("{name: p}", "p"), "deployments.0.work_pool is a section; give it keys"),
        (GOOD.replace("}]", ", older_names: b}]"), "deployments.0.older_names: give a list, such as ['b']"),
        (GOOD.replace("}]", ", schedules: [{cron: 0 3 * * *}]}]"), "deployments.0.schedules.0.slug: field required"),
        (GOOD.replace("}]", ", schedules: [nightly]}]"), "deployments.0.schedules.0 is a section"),
        (GOOD.replace("}]", ", triggers: [event]}]"), "deployments.0.triggers.0: input should be a valid dictionary"),
        (GOOD.replace("flows.train.", "flows.trian."), "flows.trian.train_flow is no flow (ModuleNotFoundError: "),
        (GOOD.replace("train_flow", "flow"), "flows.train.flow is no flow (MissingFlowError: "),
        (GOOD.replace("flows.train.train_flow", "no.py:flow"), "no.py:flow is no flow ("),
    ],
)
def test_file_that_cannot_be_deployed_is_refused_before_servers_start(
    convoy: Convoy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | bytes, hint: str
) -> None:
    monkeypatch.setattr(service, "servers_up", None)
    file = tmp_path / "prefect.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    done = convoy("deploy", "--file", str(file))
    assert (done.status, done.stdout) == (2, "")
    assert done.complaint.startswith(str(file)) and hint in done.complaint


def test_two_workers_may_create_their_pool_at_the_same_time(
    stack: object, quiet_prefect: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.deployments import ensure_pool

    def is_missing(client: SyncPrefectClient, name: str) -> None:
        raise ObjectNotFound(Exception(name))

    ensure_pool("for-two")
    monkeypatch.setattr(SyncPrefectClient, "read_work_pool", is_missing)
    ensure_pool("for-two")


@pytest.mark.slow
def test_ci_asks_for_a_training_and_hears_how_it_ended(
    convoy: Convoy, worker: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    report = tmp_path / "report.md"
    ask = ("retrain", "-d", MODEL, "--wait", "--json", "--report", str(report))
    done = convoy(*ask)
    assert done.status == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["status"], found["champion"], found["reason"]) == ("done", True, "there is no champion yet")
    page = report.read_text()
    for told in ("**promoted**", f"{found['accuracy']:.2%}", found["mlflow_run_url"], "rank-hours", "McNemar"):
        assert told in page or told == "McNemar"  # there was no champion to compare with
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in page + done.stdout + done.stderr

    again = convoy(*ask)
    assert again.status == 0
    assert json.loads(again.stdout)["status"] == "unchanged"
    assert "nothing has changed since the champion, version 1" in report.read_text()

    refused = convoy(*ask, "--set", "gate.floor=0.9999", "--force")
    assert refused.status == 3
    found = json.loads(refused.stdout)
    assert found["status"] == "refused"
    state = final_state(UUID(found["prefect_flow_run_id"]))
    assert state is not None and (state.type, state.name) == (StateType.FAILED, "Refused")
    assert "floor" in report.read_text() and "**refused**" in report.read_text()


@pytest.mark.slow
def test_the_workflows_script_works_against_a_real_worker(
    convoy: Convoy, worker: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    """The command of the job on GitHub, after the test above has made a champion."""
    variables = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PREFECT_API_URL": os.environ["PREFECT_API_URL"],
        "CONVOY_HOME": str(tmp_path / ".convoy"),  # where no server may be started
        "DEPLOYMENT": MODEL,
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"),
        "GITHUB_EVENT_NAME": "push",
    }
    script = Path(__file__).parents[2] / ".github" / "retrain.sh"
    done = subprocess.run([str(script)], cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "nothing to do" in (tmp_path / "summary.md").read_text()
    assert json.loads((tmp_path / "retrain.json").read_text())["status"] == "unchanged"
    assert list((tmp_path / ".convoy" / "logs").glob("*")) == []


@pytest.mark.slow
def test_new_data_start_a_run(convoy: Convoy, worker: subprocess.Popen[bytes]) -> None:
    before = {run.id for run in runs()}
    announced = convoy("notify-data", MODEL)
    assert (announced.status, announced.stderr) == (0, "")
    assert f"starts: {MODEL}__automation_1" in announced.stdout
    unknown = convoy("notify-data", f"{MODEL}s")
    assert (unknown.status, unknown.stdout) == (0, f"announced that {MODEL}s has changed\n")
    assert "nothing waits for it" in unknown.stderr
    name = f"{MODEL} convoy9 (event)"
    wait_for(lambda: [run for run in runs() if run.id not in before and run.name == name], f"the run {name}")


@pytest.mark.slow
def test_run_is_cancelled_from_the_command_line(
    convoy: Convoy, worker: subprocess.Popen[bytes], next_training: NextTraining
) -> None:
    started = convoy("retrain", "-d", MODEL, "--json", "--force", "--set", "epochs=100000")
    flow_run = UUID(json.loads(started.stdout)["prefect_flow_run_id"])
    training = next_training.under_way()
    assert convoy("cancel", training.run_id).status == 0
    training.assert_ends()

    assert wait_for(lambda: final_state(flow_run), "the flow run to end").name == "Cancelled"
    late = convoy("cancel", training.run_id)
    assert late.status == 2
    assert "has ended: Cancelled" in late.complaint


@pytest.mark.slow
def test_sigterm_ends_a_worker_that_a_script_has_started_and_all_that_it_runs(
    convoy: Convoy, worker: subprocess.Popen[bytes], next_training: NextTraining
) -> None:
    assert convoy("retrain", "-d", MODEL, "--force", "--set", "epochs=100000").status == 0
    training = next_training.under_way()
    for _ in range(2):  # as `timeout` does
        worker.send_signal(signal.SIGTERM)
    worker.wait(60)
    assert MlflowClient().get_run(training.run_id).info.status == "KILLED"  # its flow run has ended itself
    training.assert_ends()


@pytest.mark.slow
def test_a_training_whose_worker_is_killed_goes_on_to_its_end(
    convoy: Convoy, deployed: Path, next_training: NextTraining, tmp_path: Path
) -> None:
    with running_worker(tmp_path, "test-pool") as worker:
        started = convoy("retrain", "-d", MODEL, "--json", "--force", "--set", "epochs=60")
        flow_run = UUID(json.loads(started.stdout)["prefect_flow_run_id"])
        training = next_training.under_way()
        worker.kill()
        worker.wait()
    assert wait_for(lambda: final_state(flow_run), "the flow run to end").is_completed()
    assert MlflowClient().get_run(training.run_id).info.status == "FINISHED"


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["-d", "no-such"], "Prefect has no deployment retrain/no-such; there are: "),
        (["-d", MODEL, "--set", "epoch=3"], "did you mean 'epochs'"),
        (["-d", MODEL, "--wait", "--report", "missing/report.md"], "--report missing/report.md: cannot write there"),
    ],
)
def test_mistake_is_refused_before_anything_runs(
    convoy: Convoy, deployed: Path, arguments: list[str], hint: str
) -> None:
    before = len(runs())
    done = convoy("retrain", *arguments)
    assert done.status == 2
    assert hint in done.complaint
    assert len(runs()) == before


@pytest.mark.long
def test_one_training_of_a_model_at_a_time(stack: object, quiet_prefect: None) -> None:
    """Two flow runs need the lease; the second gets it when the first releases it."""
    import threading

    from prefect import flow

    from tasks.orchestration.model_lease import model_lease

    order: list[str] = []
    held, release = threading.Event(), threading.Event()

    @flow
    def first() -> None:
        with model_lease("leased/model:1"):
            held.set()
            release.wait(60)
            order.append("first")

    @flow
    def second() -> None:
        with model_lease("leased/model:1"):
            order.append("second")

    one = threading.Thread(target=first)
    one.start()
    assert held.wait(60)
    two = threading.Thread(target=second)
    two.start()
    two.join(3)
    assert order == []
    release.set()
    one.join()
    two.join()
    assert order == ["first", "second"]
