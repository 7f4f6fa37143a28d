"""Trials of commits: a pull request's code is tried, judged by the installed code, and changes no model."""

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
from botocore.exceptions import ClientError
from mlflow.tracking import MlflowClient
from prefect import get_client
from prefect.client.schemas.objects import StateType

from infra.tracking.tags import TRIAL
from tasks.orchestration.flow_runs import training_flow_runs
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


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_commit_is_tried_and_judged_without_a_trace_in_the_registry_and_a_newer_one_supersedes_it(
    deployed: Callable[..., str],
    start_worker: Callable[..., "subprocess.Popen[bytes]"],
    keys: dict[str, dict[str, str]],
    program: Callable[..., Program],
    tmp_path: Path,
) -> None:
    bare, (_, *commits) = pushed_copy(tmp_path, 2)
    name = deployed("tried", epochs=2)
    deployed("tried", "flows.trial.trial_flow", TRIAL_POOL, epochs=2)
    deployed("tried", "flows.trial.judge_flow", epochs=2)
    start_worker(**keys["worker"])
    start_worker(TRIAL_POOL, **keys["trials"])
    assert program("retrain", "-d", name, "--wait").wait(300).status == 0
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
    with pytest.raises(ClientError, match="AccessDenied"):
        client_of(keys["trials"]).put_object(Bucket="convoy", Key="models/tried/history/2.json", Body=b"{}")
