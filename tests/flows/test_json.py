"""`--json`: which commands have it, and what it prints."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from flows.cli.console import print_json
from flows.summary import Summary
from infra.records import Record
from tasks.training.runs import run_list
from tests.flows.conftest import Convoy
from tests.flows.test_cli import COMMANDS

PRINT_DATA = {
    *("data show", "data diff", "data check", "runs", "models", "history", "compare", "predict", "errors", "export"),
    *("config", "status", "up", "env", "doctor", "prune", "retrain", "trial"),
}
"""Commands whose result is data."""

DO_NOT = {
    *("train", "resume", "sweep"),  # they write it to a file: --summary
    *("promote", "rollback", "deploy", "cancel", "notify", "notify-data", "init", "down"),  # they say what they did
    *("worker", "join"),  # they run until they are stopped
}


def test_every_command_that_prints_data_has_json(convoy: Convoy) -> None:
    from flows.cli.app import app  # listens to signals while it loads, so not before the fixture

    def walk(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from walk(command, f"{before}{name} ")
            else:
                yield before + name, command

    commands = dict(walk(get_command(app)))
    assert commands.keys() == PRINT_DATA | DO_NOT
    assert PRINT_DATA.isdisjoint(DO_NOT)
    assert {name.split()[0] for name in commands} == set(COMMANDS.split())
    having = {name for name, command in commands.items() if any("--json" in each.opts for each in command.params)}
    assert having == PRINT_DATA


def test_any_text_and_number_is_printed_as_json_that_every_terminal_takes(capsys: pytest.CaptureFixture[str]) -> None:
    class Odd(Record):
        name: str
        path: Path
        share: float

    print_json([Odd(name="naïve 花 \udcff", path=Path("/x"), share=float("nan")), {"none": None}])
    said = capsys.readouterr().out
    assert said.isascii()
    assert json.loads(said) == [{"name": "naïve 花 \udcff", "path": "/x", "share": None}, {"none": None}]


def test_lists_and_verdicts_are_those_of_the_training(
    trained: Summary, convoy: Convoy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_list, "IDS_PER_REQUEST", 1)

    def data(*arguments: str) -> object:
        done = convoy(*arguments, "--json")
        assert done.status == 0, done.stderr
        return json.loads(done.stdout)

    name, version = trained.model_name or "", trained.model_version
    runs = {run["run_id"]: run for run in data("runs", "--limit", "1000")}  # type: ignore[attr-defined]
    run = runs[trained.mlflow_run_id]
    assert (run["status"], run["dataset"], run["network"]) == ("FINISHED", "digits", "convoy9")
    assert (run["model"], run["verdict"]) == (f"{name}/{version}", "passed")
    assert run["test_accuracy"] == trained.accuracy
    models = {model["name"]: model for model in data("models")}  # type: ignore[attr-defined]
    history = data("history", name)
    assert isinstance(history, dict)
    assert models[name]["champion"] == history["changes"][0]["to_version"]
    assert (history["changes"][-1]["to_version"], history["changes"][-1]["action"]) == (version, "promote")
    assert (history["not_promoted"], history["misplaced_aliases"]) == ({}, [])
    verdict = data("compare", f"{name}/{version}", f"{name}/{version}")
    assert isinstance(verdict, dict)
    assert (verdict["accuracy"], verdict["only_challenger"]) == (trained.accuracy, 0)
    assert {check["name"] for check in verdict["checks"]} >= {"floor", "non-inferior"}


@pytest.mark.long
def test_the_state_of_servers_and_store_is_printed_as_json(stack: object, convoy: Convoy) -> None:
    servers = json.loads(convoy("status", "--json").stdout)
    assert {server["name"]: server["state"] for server in servers} == dict.fromkeys(
        ("seaweedfs", "mlflow", "prefect"), "external"
    )
    described = json.loads(convoy("env", "--json").stdout)
    assert described["servers"] == servers
    assert described["torch"] and described["memory"].endswith("GiB")
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in json.dumps(described)
    found = json.loads(convoy("doctor", "--json").stdout)
    assert all(each["honoured"] for each in found["object_storage"] if each["needed"])
    assert all(finding["settled"] is False for finding in found["findings"])
    pruned = json.loads(convoy("prune", "--dry-run", "--json").stdout)
    assert pruned["dry_run"] is True


def test_a_configuration_is_printed_as_json(convoy: Convoy) -> None:
    values = json.loads(convoy("config", "--set", "lr=0.5", "--json").stdout)
    network = {"width": 32, "stem_width": None, "stem_kernel": 3, "dropout": 0.0}
    assert (values["lr"], values["network"]) == (0.5, network)
    assert "exclude each other" in convoy("config", "--json", "--explain").complaint
    deployed = json.loads(convoy("config", "--schema").stdout)["$defs"]["DeployConfig"]
    assert deployed["properties"]["pool"]["default"] == "convoy"


@pytest.mark.long
@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["train", "--dataset", "f"], ["fashion-mnist"]),
        (["train", "--recipe", ""], ["fashion-94", "photos", "photos-large"]),
        (["config", "--set", "augment.s"], ["augment.saturation=", "augment.shift="]),
        (["deploy", "-s", "deploy.sch"], ["deploy.schedule.cron=", "deploy.schedule.timezone="]),
        (["train", "--model", "ti"], ["timm/"]),
        (["train", "--model", "timm/resnet18"], ["timm/resnet18", "timm/resnet18d"]),
        (["not"], ["notify", "notify-data"]),
    ],
)
def test_the_shell_completes_names_and_keys(words: list[str], completed: list[str], tmp_path: Path) -> None:
    line = {"COMP_WORDS": "\n".join(["convoy", *words]), "COMP_CWORD": str(len(words))}
    done = subprocess.run(
        [sys.executable, "-P", "-c", "from convoy_cli import main; main()"],
        cwd=tmp_path,
        env=os.environ | line | {"_CONVOY_COMPLETE": "complete_bash"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.split()) == completed
