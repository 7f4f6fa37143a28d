"""Trials of commits: a pull request's code is tried, judged by the installed code, and changes no model."""

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from uuid import UUID

import boto3
import pytest
from botocore.exceptions import ClientError
from mlflow.tracking import MlflowClient
from prefect import get_client
from prefect.client.schemas.objects import StateType
from prefect.states import Crashed

from flows import trial_request
from flows.deployed_runs import cancel_flow_run, find_deployment, start
from flows.deployments import _project_entries
from flows.pipeline import judge_trial
from flows.retrain import retrain_flow
from flows.summary import Summary
from flows.train import train_flow
from flows.trial import judge_flow, trial_flow
from infra.errors import Outage, UsageError
from infra.tracking.tags import RESUMABLE, RESUMED_BY, RESUMES, TRIAL
from tasks.config.deployment import CodeConfig, DeployConfig, ProjectConfig
from tasks.config.gates import GateConfig
from tasks.config.run import RunConfig
from tasks.orchestration.flow_runs import may_go_on, training_flow_runs
from tasks.release.trial import judge
from tests.conftest import PORT_RANGE
from tests.flows.program import Program, wait_for
from tests.flows.test_code_by_commit import pushed_copy
from tests.flows.test_resumption import POOL, deployed, run_of, start_worker

__all__ = ["deployed", "start_worker"]

TRIAL_POOL = f"{POOL}-trials"
WRITABLE = (
    *("datasets", "journals", "listings", "nodes", "pretrained", "probe", "published"),
    *("raw", "reports", "runs", "shards", "sources", "steps"),
)
"""All prefixes but models/, mlflow/ and pruning/."""


@pytest.fixture
def keys(stack: object, tmp_path: Path) -> Iterator[dict[str, dict[str, str]]]:
    """An object store with two keys, as variables of the environment; that for trials cannot write to models/."""
    actions = ["Read:convoy", "List:convoy", *(f"Write:convoy/{prefix}/*" for prefix in WRITABLE)]
    rights = {"worker": ["Admin", "Read", "Write", "List", "Tagging"], "trials": actions}
    secret = {name: f"{name}-{random.getrandbits(64):x}" for name in rights}
    identities = [
        {"name": name, "credentials": [{"accessKey": name, "secretKey": secret[name]}], "actions": rights[name]}
        for name in rights
    ]
    (tmp_path / "s3.json").write_text(json.dumps({"identities": identities}))
    s3, master, volume, filer = random.sample(PORT_RANGE, 4)
    weed = Path(sys.executable).parent / "weed"
    (tmp_path / "store").mkdir()
    command = [
        weed,
        "server",
        f"-dir={tmp_path / 'store'}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-s3",
        f"-s3.port={s3}",
    ]
    command += [f"-s3.config={tmp_path / 's3.json'}", f"-master.port={master}", f"-volume.port={volume}"]
    command += [f"-filer.port={filer}", "-volume.max=0", "-master.volumeSizeLimitMB=64", "-master.telemetry=false"]
    with (tmp_path / "weed.log").open("wb") as log:
        server = subprocess.Popen([*command, "-volume.preStopSeconds=0"], stdout=log, stderr=log)
    place = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3}", "CONVOY_BUCKET": "convoy"}
    found = {name: place | {"AWS_ACCESS_KEY_ID": name, "AWS_SECRET_ACCESS_KEY": secret[name]} for name in rights}

    def has_bucket() -> bool:
        try:
            client_of(found["worker"]).create_bucket(Bucket="convoy")
        except Exception:  # it is not ready
            return False
        return True

    try:
        wait_for(has_bucket, "the object store")
        yield found
    finally:
        server.terminate()
        server.wait(30)


def client_of(variables: dict[str, str]) -> "boto3.client":
    return boto3.client(
        "s3",
        endpoint_url=variables["AWS_ENDPOINT_URL"],
        aws_access_key_id=variables["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=variables["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
    )


A, B = "a" * 40, "b" * 40


@pytest.mark.long
def test_of_the_trials_with_a_key_only_one_of_the_same_commit_and_configuration_goes_on(
    deployed: Callable[..., str],
) -> None:
    deployed("asked-trial", "flows.trial.trial_flow", f"{POOL}-idle")
    with get_client(sync_client=True) as client:
        trial = find_deployment(client, "trial/asked-trial")
        parameters = {"config": {**trial.parameters["config"], "epochs": 2}}

        def started(ref: str, key: str, **changes: int) -> str:
            config = parameters["config"] | changes
            code = CodeConfig(repository="/team.git", ref=ref)
            return str(start(client, trial, {"config": config}, code=code, labels={TRIAL: key}).id)

        def supersede(ref: str) -> str | None:
            code = CodeConfig(repository="/team.git", ref=ref)
            found = trial_request._supersede(client, trial, "pull-1", code, parameters, print)
            return found and str(found)

        def states(*runs: str) -> list[str | None]:
            return [run_of(each).state_name for each in runs]

        earlier, same, longer, other = (
            started(A, "pull-1"),
            started(B, "pull-1"),
            started(B, "pull-1", epochs=3),
            started(A, "pull-2"),
        )
        assert supersede(B) == same
        assert states(earlier, same, longer, other) == ["Cancelled", "Scheduled", "Cancelled", "Scheduled"]
        client.set_flow_run_state(UUID(same), Crashed(), force=True)
        assert supersede(B) == same  # a worker resumes it
        assert supersede("main") is None  # which may have gone on since
        assert not may_go_on(run_of(same))
        dead = started(B, "pull-1")
        client.set_flow_run_state(UUID(dead), Crashed(), force=True)
        whole = {"config": {**parameters["config"], "batch_size": 32}}  # that of its record, with a batch size
        labels, code = {TRIAL: "pull-1", RESUMES: dead}, CodeConfig(repository="/team.git", ref=B)
        resumed = str(start(client, trial, whole, code=code, labels=labels).id)
        client.update_flow_run_labels(UUID(dead), {RESUMED_BY: resumed})
        assert (supersede(B), states(resumed)) == (resumed, ["Scheduled"])
        assert (supersede("main"), states(resumed)) == (None, ["Cancelled"])
        branch = started("main", "pull-1")
        assert supersede("main") is None
        assert states(branch, other) == ["Cancelled", "Scheduled"]
        cancel_flow_run(client, run_of(other), "the end of the test")


def test_a_project_with_a_pool_for_trials_has_their_deployments() -> None:
    deploy = {"trial_pool": "untrusted", "older_names": ["roses"], "schedule": {"cron": "0 3 * * *"}}
    project = ProjectConfig.model_validate({"dataset": "digits", "name": "flowers", "deploy": deploy})
    found = {entry["name"]: entry for entry in _project_entries(project)}
    assert found.keys() == {"flowers", "flowers-trial", "flowers-judge"}
    assert [found[f"flowers-{flow}"]["work_pool"] for flow in ("trial", "judge")] == [
        {"name": "untrusted"},
        {"name": "convoy"},
    ]
    for flow in ("trial", "judge"):
        entry = found[f"flowers-{flow}"]
        assert (entry["schedules"], entry["older_names"]) == ([], [f"roses-{flow}"])
        assert entry["parameters"]["config"]["name"] == "flowers"
    without = project.model_copy(update={"deploy": DeployConfig()})
    assert [entry["name"] for entry in _project_entries(without)] == ["flowers"]


def test_code_that_cannot_be_loaded_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Exception] = []
    monkeypatch.setattr("tasks.orchestration.failure.tell_failure", lambda error, **_: told.append(error))
    monkeypatch.setitem(sys.modules, "flows.pipeline", None)
    config = RunConfig(dataset="digits")
    for call in (
        partial(retrain_flow.fn, config),
        partial(train_flow.fn, config),
        partial(trial_flow.fn, config),
        partial(judge_flow.fn, config, "0"),
    ):
        with pytest.raises(ImportError):
            call()
    assert len(told) == 4


def test_a_judgement_that_an_outage_ends_may_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def away() -> None:
        raise Outage("MLflow does not answer")

    labels: dict[str, str] = {}
    monkeypatch.setattr("flows.pipeline.check_server", away)
    monkeypatch.setattr("tasks.orchestration.failure.label_flow_run", labels.update)
    monkeypatch.setattr("tasks.orchestration.failure.tell_failure", lambda *_, **__: None)
    with pytest.raises(Outage):
        judge_trial(RunConfig(dataset="digits"), "run")
    assert labels == {RESUMABLE: "MLflow does not answer"}


def test_only_a_trial_is_judged_as_if(trained: Summary) -> None:
    with pytest.raises(UsageError, match="is no trial of a commit"):
        judge.fn("whole-flow", str(trained.mlflow_run_id), GateConfig(), ())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_commit_is_tried_and_judged_without_a_trace_in_the_registry_and_a_newer_one_supersedes_it(
    deployed: Callable[..., str],
    start_worker: Callable[..., "subprocess.Popen[bytes]"],
    keys: dict[str, dict[str, str]],
    program: Callable[..., Program],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    bare, (_, *commits) = pushed_copy(tmp_path, 2)
    name = deployed("tried", epochs=2)
    deployed("tried-trial", "flows.trial.trial_flow", TRIAL_POOL, "tried", epochs=2)
    deployed("tried-judge", "flows.trial.judge_flow", POOL, "tried", epochs=2)
    start_worker(**keys["worker"])
    start_worker(TRIAL_POOL, **keys["trials"])
    assert program("retrain", "-d", name, "--wait").wait(600).status == 0
    s3 = client_of(keys["worker"])

    def models() -> list[tuple[str, str]]:
        return [
            (each["Key"], each["ETag"]) for each in s3.list_objects_v2(Bucket="convoy", Prefix="models/")["Contents"]
        ]

    before = models()
    assert before

    def trial(commit: str, *options: str) -> Program:
        report = str(tmp_path / f"{commit}.md")
        asked = ("trial", commit, "-d", name, "--repository", str(bare), "--key", "pull-12", "--report", report)
        folder = tmp_path / commit
        folder.mkdir(exist_ok=True)
        return Program(*asked, "--json", *options, folder=folder)

    first = trial(commits[0], "-s", "epochs=100000")
    with get_client(sync_client=True) as client:
        running = wait_for(
            lambda: [run for run in training_flow_runs(client, [StateType.RUNNING]) if run.labels.get(TRIAL)], "it", 300
        )
    second = trial(commits[1]).wait(600)
    superseded = first.wait(60)
    summary = json.loads(second.stdout)
    assert (superseded.status, run_of(str(running[0].id)).state_name) == (75, "Cancelled")
    assert (second.status, summary["trial"], summary["commit"]) == (0, True, commits[1]), second.stderr
    assert (summary["gain"], "champion" in summary, "model_version" in summary) == (0, False, False)
    report = (tmp_path / f"{commits[1]}.md").read_text()
    assert "**a trial that the quality gate would pass**" in report
    assert commits[1] in report

    assert models() == before
    tracking = MlflowClient()
    assert [each.version for each in tracking.search_model_versions("name = 'tried'")] == ["1"]
    run = tracking.get_run(summary["mlflow_run_id"])
    experiment = tracking.get_experiment(run.info.experiment_id)
    assert (experiment.name, run.data.tags["convoy.verdict"]) == ("digits trials", "passed")
    champion = tracking.get_model_version("tried", "1")
    assert run.data.tags["convoy.code_digest"] != tracking.get_run(champion.run_id).data.tags["convoy.code_digest"]
    assert not tracking.search_model_versions(f"run_id = '{run.info.run_id}'")
    for variable, value in keys["worker"].items():
        monkeypatch.setenv(variable, value)
    resumed = program("resume", run.info.run_id).wait()
    assert (resumed.status, "is a trial of a commit, which registers nothing" in resumed.complaint) == (2, True)
    with pytest.raises(ClientError, match="AccessDenied"):
        client_of(keys["trials"]).put_object(Bucket="convoy", Key="models/tried/history/2.json", Body=b"{}")
