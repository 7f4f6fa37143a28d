"""The pipeline with a team's services, as in infra/compose.yaml: PostgreSQL, and passwords for everything."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import httpx
import psutil
import pytest

from tests.flows.program import SMALL, sets
from tests.infra.team import REPOSITORY, USERS_OWN, Team

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SMALL_TRAINING = ("train", "--dataset", "digits", "--epochs", "1", "--limit", "300", *sets(*SMALL))


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    """All services except the worker, ready."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parts[-2]))
    if not programs or int(programs[-1].parts[-2]) < 15 or not shutil.which("psql"):
        pytest.skip("PostgreSQL 15 or newer is not installed: install Debian's package postgresql")
    for module in ("psycopg2", "flask_wtf"):
        pytest.importorskip(module, reason="the extra `team` is not installed: run `make setup`")
    folder = Path(tempfile.mkdtemp(prefix="convoy-team-"))  # PostgreSQL's user cannot enter pytest's own folder
    folder.chmod(0o711)
    team = Team(folder)
    try:
        team.start_all(programs[-1])
        yield team
    finally:
        team.stop()
        shutil.rmtree(folder)


class CommandLines:
    """Notes the command lines of all processes, which every user of a machine can read, while the block runs."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._over.wait(0.2):
            for process in psutil.process_iter(["cmdline"]):
                self.seen.add(" ".join(process.info["cmdline"] or ()))

    def __enter__(self) -> "CommandLines":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def convoy(team: Team, *arguments: str, **variables: str | None) -> "subprocess.CompletedProcess[str]":
    """`convoy` as a user of the services runs it; a variable that is None is not set."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(USERS_OWN)}
    home = {
        "CONVOY_HOME": str(team.folder / "home"),
        "PYTHONPATH": str(REPOSITORY),
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    changed = {**team.client, **home, **variables}
    return subprocess.run(
        [sys.executable, "-P", "-c", "from flows.cli import main; main()", *arguments],
        env=environment | {name: value for name, value in changed.items() if value is not None},
        cwd=team.folder,
        capture_output=True,
        text=True,
        timeout=300,
    )


def api(team: Team, path: str, **question: Any) -> Any:
    """What Prefect answers."""
    user, password = team.client["PREFECT_API_AUTH_STRING"].split(":")
    answer = httpx.post(f"{team.client['PREFECT_API_URL']}/{path}", json=question, auth=(user, password))
    return answer.raise_for_status().json()


@pytest.fixture(scope="module")
def trained(team: Team) -> tuple[dict[str, Any], set[str], str]:
    """A whole training: its summary, the command lines seen while it ran, and its output."""
    with CommandLines() as lines:
        done = convoy(team, *SMALL_TRAINING, "--summary", "summary.json")
    assert done.returncode == 0, done.stderr
    return json.loads((team.folder / "summary.json").read_text()), lines.seen, done.stdout + done.stderr


def test_a_training_is_registered_and_everything_is_where_the_file_says(
    team: Team, trained: tuple[dict[str, Any], set[str], str]
) -> None:
    summary = trained[0]
    assert summary["status"] == "done" and summary["model_version"] == "1"
    assert summary["mlflow_tracking_uri"] == team.client["MLFLOW_TRACKING_URI"]
    for database, question, answer in (
        ("mlflow", "SELECT count(*) FROM model_versions WHERE name = 'digits'", "1"),
        ("mlflow_auth", "SELECT username FROM users", "admin"),
        ("prefect", "SELECT count(*) FROM deployment WHERE name = 'fashion-mnist'", "1"),
        ("prefect", f"SELECT state_name FROM flow_run WHERE id = '{summary['prefect_flow_run_id']}'", "Completed"),
    ):
        assert team.ask_postgres(database, question).stdout.strip() == answer
    objects = s3(team).list_objects_v2(Bucket="convoy", Prefix="mlflow/")["Contents"]
    assert any(item["Key"].endswith("model.pt2") for item in objects)


def test_no_secret_is_in_logs_parameters_artifacts_or_command_lines(
    team: Team, trained: tuple[dict[str, Any], set[str], str], tmp_path: Path
) -> None:
    summary, command_lines, output = trained
    run = summary["mlflow_run_id"]
    places: dict[str, str] = {"output": output, "command lines": "\n".join(command_lines)}
    for file in (*(team.folder / "logs").iterdir(), *(team.folder / "home").rglob("*")):
        if file.is_file():
            places[str(file)] = file.read_bytes().decode(errors="replace")
    auth = ("admin", team.secrets["MLFLOW_ADMIN_PASSWORD"])
    mlflow = f"{team.client['MLFLOW_TRACKING_URI']}/api/2.0/mlflow"
    places["MLflow"] = httpx.get(f"{mlflow}/runs/get", params={"run_id": run}, auth=auth).raise_for_status().text
    assert run in places["MLflow"]
    for kind in ("flow_runs", "task_runs", "logs", "artifacts", "deployments", "events"):
        places[f"Prefect's {kind}"] = json.dumps(api(team, f"{kind}/filter"))
    assert summary["prefect_flow_run_id"] in places["Prefect's flow_runs"]
    client = s3(team)
    for page in client.get_paginator("list_objects_v2").paginate(Bucket="convoy"):
        for item in page["Contents"]:
            body = client.get_object(Bucket="convoy", Key=item["Key"])["Body"].read()
            places[item["Key"]] = body.decode(errors="replace")
    assert any(place.endswith("report/index.html") for place in places)
    secrets = {name: value.rpartition(":")[2] for name, value in team.secrets.items() if name != "S3_ACCESS_KEY_ID"}
    found = [(name, place) for place, text in places.items() for name, secret in secrets.items() if secret in text]
    assert found == []


@pytest.mark.parametrize(
    ("command", "variables", "complaint"),
    [
        (SMALL_TRAINING, {"AWS_SECRET_ACCESS_KEY": "wrong"}, "access denied"),
        (SMALL_TRAINING, {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "no credentials"),
        (("runs",), {"MLFLOW_TRACKING_PASSWORD": "wrong"}, "check MLFLOW_TRACKING_USERNAME"),
        (
            ("runs",),
            {"MLFLOW_TRACKING_USERNAME": None, "MLFLOW_TRACKING_PASSWORD": None},
            "check MLFLOW_TRACKING_USERNAME",
        ),
        (SMALL_TRAINING, {"PREFECT_API_AUTH_STRING": "convoy:wrong"}, "check PREFECT_API_AUTH_STRING"),
        (("deploy",), {"PREFECT_API_AUTH_STRING": None}, "check PREFECT_API_AUTH_STRING"),
        (("notify-data", "digits"), {"PREFECT_API_AUTH_STRING": None}, "check PREFECT_API_AUTH_STRING"),
    ],
)
def test_wrong_and_missing_credentials_end_in_one_line(
    team: Team, command: tuple[str, ...], variables: dict[str, str | None], complaint: str
) -> None:
    done = convoy(team, *command, **variables)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("convoy: "))
    assert complaint in line and done.stderr.rstrip().endswith(line)
    assert "wrong" not in line


def test_each_server_refuses_strangers(team: Team) -> None:
    for address in (
        f"{team.client['AWS_ENDPOINT_URL']}/convoy",
        f"{team.client['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/experiments/get?experiment_id=0",
        f"{team.client['MLFLOW_TRACKING_URI']}/api/2.0/mlflow-artifacts/artifacts",
        f"{team.client['PREFECT_API_URL']}/admin/version",
        f"{team.client['PREFECT_API_URL']}/work_pools/convoy",
    ):
        for auth in (None, ("admin", "password"), ("admin", "wrong")):
            assert httpx.get(address, auth=auth).status_code in (401, 403), address


def test_a_database_is_its_owners_only(team: Team) -> None:
    right = {"mlflow": team.secrets["MLFLOW_DB_PASSWORD"], "prefect": team.secrets["PREFECT_DB_PASSWORD"]}
    for user, database, password in (
        ("prefect", "mlflow", right["prefect"]),
        ("mlflow", "prefect", right["mlflow"]),
        ("mlflow", "mlflow", "wrong"),
        ("mlflow", "mlflow", ""),
    ):
        done = team.ask_postgres(database, "SELECT 1", user, password)
        assert done.returncode == 2 and not done.stdout


def test_the_worker_runs_what_a_deployment_asks_for(team: Team) -> None:
    team.start("worker")
    done = convoy(team, "retrain", "--set", "dataset=digits", *sets(*SMALL, "epochs=1", "name=by-worker"), "--wait")
    assert done.returncode == 0, done.stderr + team.log("worker").read_text()
    asked = "SELECT count(*) FROM model_versions WHERE name = 'by-worker'"
    assert team.ask_postgres("mlflow", asked).stdout.strip() == "1"


def s3(team: Team) -> Any:
    """A client with the keys."""
    names = {"aws_access_key_id": "AWS_ACCESS_KEY_ID", "aws_secret_access_key": "AWS_SECRET_ACCESS_KEY"}
    keys = {argument: team.client[name] for argument, name in names.items()}
    return boto3.client("s3", endpoint_url=team.client["AWS_ENDPOINT_URL"], region_name="us-east-1", **keys)
