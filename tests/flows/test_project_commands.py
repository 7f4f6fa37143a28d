"""A project: `convoy init`, its `convoy.yaml` in each command that reads it, and its deployment."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow.tracking import MlflowClient
from prefect import get_client
from prefect.blocks.webhook import Webhook
from prefect.client.schemas.responses import DeploymentResponse
from pydantic import SecretStr

from infra.settings import Settings
from infra.stack.local_stack import down
from tasks.config.deployment import ProjectConfig, load_project
from tests.flows.conftest import Convoy
from tests.flows.program import Done, running_worker
from tests.flows.test_cli import pictures

SECRET = "http://127.0.0.1:9/hooks/T0/secret"
CONFIG: dict[str, Any] = {
    "dataset": "photos",
    "name": "in-a-project",
    "network": {"width": 4},
    "epochs": 1,
    "batch_size": 16,
    "ranks": 1,
    "augment": {"shift": 0},
    "serving": {"http": False},
    "gate": {"floor": 0, "min_class_recall": 0},
    "data_gate": {"min_test_images": 1},
}


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Done]]:
    """Runs `convoy` as a program in an empty folder, without servers; those that a fault starts are stopped."""
    servers = ("AWS_", "MLFLOW_", "PREFECT_")
    own = {name: value for name, value in os.environ.items() if not name.startswith(servers)}

    def start(*arguments: str, **variables: str) -> Done:
        command = [sys.executable, "-P", "-c", "from convoy_cli import main; main()", *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=own | {"CONVOY_HOME": "state"} | variables, capture_output=True, text=True
        )
        return Done(done.returncode, done.stdout, done.stderr)

    yield start
    if (tmp_path / "state").exists():
        down(Settings(home=tmp_path / "state"))


@pytest.mark.long
def test_init_writes_a_project_that_the_commands_read_and_never_overwrites(
    run: Callable[..., Done], tmp_path: Path
) -> None:
    done = run("init", "a project")
    assert (done.status, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].startswith("next: cd 'a project' && convoy train ")
    there = {file.name: file.read_text() for file in (tmp_path / "a project").iterdir()}
    assert there.keys() == {"convoy.yaml", "my_network.py"}
    (tmp_path / "a project" / "convoy.yaml").unlink()
    again = run("init", "a project")
    assert (again.status, again.complaint) == (2, "already there: a project/my_network.py; nothing was written")
    assert not (tmp_path / "a project" / "convoy.yaml").exists()
    assert run("init", "a project/my_network.py").status == 2  # a file is no folder
    assert "File name too long" in run("init", "x" * 300).complaint

    assert run("init").status == 0  # in the working folder
    (tmp_path / "convoy.yaml").write_text(there["convoy.yaml"] + "epochs: 3\nseed: 3\n")
    read = run("config", "--set", "seed=4")
    assert (read.status, read.stderr) == (0, "configuration: convoy.yaml\n")
    values = yaml.safe_load(read.stdout)
    assert (values["epochs"], values["seed"], values["dataset"]) == (3, 4, "fashion-mnist")
    (tmp_path / "other.yaml").write_text("epochs: 5")
    for file, epochs in (("/dev/null", 9), ("other.yaml", 5)):
        other = run("config", "--config", file)
        assert (yaml.safe_load(other.stdout)["epochs"], other.stderr) == (epochs, "")


@pytest.mark.parametrize("command", ["train", "retrain", "config", "deploy"])
def test_a_mistake_in_the_project_is_refused_in_one_line_before_servers_start(
    run: Callable[..., Done], tmp_path: Path, command: str
) -> None:
    (tmp_path / "convoy.yaml").write_text("dataset: digits\ndeploy: {schedul: {}}")
    done = run(command)
    assert (done.status, done.stdout) == (2, "")
    expected = "convoy.yaml: unknown key 'deploy.schedul'; did you mean 'deploy.schedule'?"
    assert done.stderr.splitlines() == ["configuration: convoy.yaml", f"convoy: {expected}"]
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("arguments", "variables", "complaint"),
    [
        ("deploy", {}, "deploy.notification.variable: HOOK is not set here"),
        ("deploy", {"HOOK": "mailto:x"}, "the webhook's address must start with http:// or https:// and name a host"),
        ("deploy --file x.yaml --epochs 3", {}, "--file and the options of a configuration exclude each other"),
        ("retrain --report r.md", {}, "--report needs --wait: there is nothing to report before the end"),
        ("promote photos 3 --force --judge", {}, "--force needs a --reason, which is kept in the history"),
    ],
)
def test_what_cannot_succeed_is_refused_before_servers_start(
    run: Callable[..., Done], tmp_path: Path, arguments: str, variables: dict[str, str], complaint: str
) -> None:
    (tmp_path / "convoy.yaml").write_text("deploy: {notification: {variable: HOOK}}")
    done = run(*arguments.split(), **variables)
    assert (done.status, done.complaint) == (2, complaint)
    assert not (tmp_path / "state").exists()


def entries(**deploy: object) -> list[dict[str, Any]]:
    """Returns the deployments of a project with this section `deploy`."""
    from flows.deployments import _project_entries

    return list(_project_entries(load_project(None, (), CONFIG | {"deploy": deploy})))


def test_a_project_is_deployed_under_the_name_of_its_model_with_its_configuration() -> None:
    (retrain,) = entries()
    assert (retrain["name"], retrain["entrypoint"]) == ("in-a-project", "flows.retrain.retrain_flow")
    assert retrain["parameters"] == {"config": CONFIG}  # and no default: a new default would be a reason to retrain
    assert retrain["schedules"] == []
    assert [trigger["match"] for trigger in retrain["triggers"]] == [
        {"prefect.resource.id": "convoy.dataset.in-a-project"}
    ]
    assert retrain["work_pool"] == {"name": "convoy"}
    assert "fashion-mnist" not in str(retrain)
    from flows.deployments import _project_entries

    (of_table,) = _project_entries(ProjectConfig(dataset="photos/labels.csv"))
    assert (of_table["name"], of_table["older_names"]) == ("labels", ["labels.csv"])
    (of_folder,) = _project_entries(ProjectConfig(dataset="."))
    assert of_folder["parameters"]["config"]["name"] == of_folder["name"]  # a worker works elsewhere

    schedule = {"cron": "0 3 * * *", "timezone": "Europe/Berlin"}
    retrain, prune = entries(pool="p", new_data=False, schedule=schedule, retention={"runs_days": 9}, older_names=["b"])
    assert retrain["schedules"] == [{"slug": "nightly", **schedule}]
    assert (retrain["triggers"], retrain["older_names"], retrain["work_pool"]["name"]) == ([], ["b"], "p")
    assert (prune["name"], prune["entrypoint"], prune["schedules"]) == ("storage", "flows.prune.prune_flow", [])
    assert prune["parameters"] == {"retention": {"runs_days": 9}}
    _, prune = entries(prune={"cron": "0 5 * * 0"})
    assert prune["schedules"] == [{"slug": "weekly", "cron": "0 5 * * 0", "timezone": "UTC"}]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a project with images, which the tests work in, and packages with the names of Convoy's own."""
    monkeypatch.chdir(tmp_path)
    for number, label in enumerate(("cat", "dog")):
        pictures(tmp_path / "photos" / label, 60, 8 + number)
    for name in ("tasks", "flows"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('not this one')")
    return tmp_path


def write(**deploy: object) -> None:
    Path("convoy.yaml").write_text(yaml.safe_dump(CONFIG | {"deploy": {"pool": "project-pool", **deploy}}))


def registered(name: str = f"retrain/{CONFIG['name']}") -> DeploymentResponse:
    with get_client(sync_client=True) as client:
        return client.read_deployment_by_name(name)


def triggers() -> list[str]:
    with get_client(sync_client=True) as client:
        found = client.read_resource_related_automations(f"prefect.deployment.{registered().id}")
    return [each.name for each in found]


@pytest.mark.slow
def test_deploy_makes_changes_and_deletes_what_the_project_says(
    convoy: Convoy, stack: object, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOOK", SECRET)
    nightly = {"cron": "0 3 * * *", "timezone": "Europe/Berlin"}
    write(schedule=nightly, retention={"runs_days": 9}, notification={"variable": "HOOK", "stale_after": 3})
    done = convoy("deploy")
    assert done.status == 0, done.stderr
    first, prune, messages = done.stdout.splitlines()
    assert first == "retrain/in-a-project  at 0 3 * * * Europe/Berlin (on)"
    assert prune == "prune/storage"
    assert messages.startswith("messages: convoy: promoted, ")
    assert done.stderr.splitlines()[0] == "configuration: convoy.yaml"
    before = registered()
    assert before.parameters["config"] == CONFIG
    assert registered("prune/storage").parameters["retention"] == {"runs_days": 9}
    assert triggers() == ["New images for in-a-project"]
    address = Webhook.load("convoy-notifications").url  # type: ignore[union-attr]
    assert address.get_secret_value() == SECRET
    assert "secret" not in done.stdout + done.stderr + str(before.parameters)

    Webhook(url=SecretStr(SECRET + "2")).save("team-chat", overwrite=True)
    write(new_data=False, notification={"block": "team-chat"})
    assert convoy("deploy", "--epochs", "2").stdout.splitlines()[0] == "retrain/in-a-project"
    after = registered()
    assert (after.id, after.schedules) == (before.id, [])
    assert after.parameters["config"] == CONFIG | {"epochs": 2}
    assert triggers() == []
    address = Webhook.load("convoy-notifications").url  # type: ignore[union-attr]
    assert address.get_secret_value() == SECRET + "2"
    write(notification={"block": "no-such"})
    assert "Prefect has no block no-such of type Webhook" in convoy("deploy").complaint
    assert convoy("notify", "--off").status == 0


@pytest.fixture
def worker(project: Path, stack: object) -> Iterator["subprocess.Popen[bytes]"]:
    with running_worker(project, "project-pool") as worker:
        yield worker


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_worker_in_the_project_retrains_by_the_file_with_paths_relative_to_it(
    convoy: Convoy, worker: "subprocess.Popen[bytes]", project: Path
) -> None:
    write()
    assert convoy("deploy").status == 0
    asked = convoy("retrain", "--wait", "--json")
    assert asked.status == 0, asked.stderr
    summary = yaml.safe_load(asked.stdout)
    assert (summary["status"], summary["model_name"], summary["dataset"]) == ("done", "in-a-project", "photos")
    assert set(project.iterdir()) == {project / name for name in ("convoy.yaml", "photos", "tasks", "flows", "log")}
    assert yaml.safe_load(convoy("retrain", "--wait", "--json").stdout)["status"] == "unchanged"
    same = convoy("retrain", "-d", "in-a-project", "--wait", "--json")  # by the deployment's own configuration
    assert yaml.safe_load(same.stdout)["status"] == "unchanged"
    assert "configuration" not in same.stderr
    Path("convoy.yaml").write_text(yaml.safe_dump(CONFIG | {"seed": 1}))  # it need not be deployed again
    changed = yaml.safe_load(convoy("retrain", "--wait", "--json").stdout)
    assert "seed was 0, is 1" in changed["reason"]
    run = MlflowClient().get_run(changed["mlflow_run_id"])
    assert run.data.params["seed"] == "1"
