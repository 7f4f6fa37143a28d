"""The project's file: what it may hold, what is refused, and the files of a new project."""

import importlib.util
import os
import re
from pathlib import Path

import pytest
import torch
import yaml

from infra.errors import UsageError
from tasks.config.deployment import ProjectConfig, load_project
from tasks.config.explain import STARTER_KEYS, starter
from tasks.config.key_values import known_keys
from tasks.config.keys import sections_of
from tasks.config.project import STARTER_NETWORK, project_file
from tasks.config.run import RunConfig, load_config

SECRET = "https://hooks.example/T0/secret"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("convoy.yaml")


def test_the_project_is_the_working_folder_and_its_file_is_the_one_there(file: Path, tmp_path: Path) -> None:
    assert project_file() is None
    file.touch()
    assert project_file() == file
    (tmp_path / "inner").mkdir()
    os.chdir("inner")
    assert project_file() is None  # of the working folder, not of those above it
    file.symlink_to("nothing")
    with pytest.raises(UsageError, match=r"cannot read the configuration convoy.yaml: No such file"):
        load_project(project_file())


def test_a_recipe_in_the_file_is_the_base_of_its_other_keys_and_an_option_replaces_it(file: Path) -> None:
    file.write_text("recipe: fashion-94\nepochs: 3\nlr: 0.3\n")
    expected = load_config(None, ["epochs=3", "lr=0.3"], recipe="fashion-94")
    assert load_project(file).run == expected
    assert load_project(file, ["epochs=4"]).run.epochs == 4
    photos = load_project(file, recipe="photos").run
    assert (
        photos
        == load_project(file, ["recipe=photos"]).run
        == load_config(None, ["epochs=3", "lr=0.3"], recipe="photos")
    )
    assert photos.model != expected.model


def test_a_deployment_has_the_configuration_of_the_same_keys_without_a_file(file: Path) -> None:
    """Whether a night retrains depends on the keys that are set, so the project must add none."""
    file.write_text(
        "dataset: digits\nmodel: notes\nnetwork: {hidden: [8]}\ndata: {limit: 9}\n"
        "deploy:\n  schedule: {cron: 0 3 * * *}\n  retention: {runs_days: 3}\n"
    )
    project = load_project(file)
    same = load_config(None, ["dataset=digits", "model=notes", "network.hidden=[8]", "data.limit=9"])
    assert type(project.run) is RunConfig
    assert project.run == same
    assert project.run.model_dump(exclude_unset=True) == same.model_dump(exclude_unset=True)
    assert (project.deploy.schedule.cron, project.deploy.retention.runs_days) == ("0 3 * * *", 3)


@pytest.mark.parametrize(
    ("text", "complaint"),
    {
        "epoch: 3": "unknown key 'epoch'; did you mean 'epochs'?",
        "deplyo: {}": "unknown key 'deplyo'; did you mean 'deploy'?",
        "augment: {shfit: 1}": "unknown key 'augment.shfit'; did you mean 'augment.shift'?",
        "deploy: {shedule: {}}": "unknown key 'deploy.shedule'; did you mean 'deploy.schedule'?",
        "deploy: {schedule: {crn: x}}": "unknown key 'deploy.schedule.crn'; did you mean 'deploy.schedule.cron'?",
        "deploy: {retention: {run_days: 1}}": "unknown key 'deploy.retention.run_days'; did you mean",
        "recipe: foto": "unknown recipe 'foto'; did you mean 'photos'?",
        "recipe: 3": "unknown recipe 3",
        "recipe: {a: 1}": "unknown recipe {'a': 1}",
        "lr: -1": "lr: input should be greater than 0 (given: -1)",
        "deploy: {schedule: {cron: 0 3 * *}}": "'0 3 * *' does not have the five fields minute, hour, day, month",
        "deploy: {schedule: {cron: 0 24 * * *}}": "the hour '24' is not between 0 and 23",
        "deploy: {schedule: {cron: 0 3 32 * *}}": "the day '32' is not between 1 and 31",
        "deploy: {prune: {cron: 0 3 * * 1..5}}": "deploy.prune.cron: '0 3 * * 1..5': the weekday",
        "deploy: {schedule: {cron: '*/0 3 * * *'}}": "deploy.schedule.cron: '*/0 3 * * *': the minute '*/0'",
        "deploy: {schedule: {cron: 0 3 * * abc}}": "the weekday 'abc'",
        "deploy: {schedule: {cron: 0 3 * mon *}}": "the month 'mon'",
        "deploy: {schedule: {cron: '0 3 * * 1,2,,'}}": "the weekday '1,2,,'",
        "deploy: {schedule: {timezone: Europe/Berlim}}": "did you mean 'Europe/Berlin'?",
        f"deploy: {{notification: {SECRET}}}": "deploy.notification is a section; give it keys, or leave it out",
        f"deploy: {{notification: [{SECRET}]}}": "deploy.notification is a section; give it keys, or leave it out",
        f"deploy: {{notification: {{variable: '{SECRET}'}}}}": "the webhook's address is a secret",
        f"deploy: {{notification: {{block: '{SECRET}'}}}}": "the webhook's address is a secret",
        f"deploy: {{notification: {{url: '{SECRET}'}}}}": "unknown key 'deploy.notification.url'",
        "deploy: {notification: {variable: A, block: b}}": "variable and block exclude each other",
    }.items(),
)
def test_a_mistake_in_the_file_is_one_line_that_names_file_and_key(file: Path, text: str, complaint: str) -> None:
    file.write_text(text)
    with pytest.raises(UsageError) as refused:
        load_project(file, ["seed=1"], {"epochs": 2} if "epoch" not in text else {})
    message = str(refused.value)
    assert message.startswith("convoy.yaml: ")
    assert complaint in message
    assert "\n" not in message and "secret" not in message.replace("is a secret", "")


def test_a_mistake_on_the_command_line_is_not_blamed_on_the_file(file: Path) -> None:
    file.write_text("lr: 0.3")
    for settings, complaint in (
        (["epoch=3"], "unknown key 'epoch'"),
        (["lr=-1"], "lr: input"),
        (["recipe=x"], "unknown"),
        (["recipe=[photos]"], "unknown recipe"),
    ):
        with pytest.raises(UsageError, match=f"^{complaint}"):
            load_project(file, settings)


@pytest.mark.parametrize(
    "cron",
    [
        "0 3 * * *",
        "*/5 0-6,22 1 jan,7 mon-fri",
        "59 23 31 12 7",
        "0 0 * * 5#2",
        "0 0 * * L5,l1",
        "15 4 L * *",
        "5/10 22-3 1,L NOV-Feb/2 *",
    ],
)
def test_a_cron_that_prefect_takes_is_taken(cron: str) -> None:
    from prefect.client.schemas.schedules import CronSchedule

    assert CronSchedule(cron=cron).cron == cron
    assert load_project(None, [f"deploy.schedule.cron='{cron}'"]).deploy.schedule.cron == cron


def test_the_file_of_a_new_project_is_the_default_and_each_key_in_it_can_be_set(file: Path) -> None:
    text = starter()
    file.write_text(text)
    assert load_project(file).run == RunConfig()
    file.write_text(re.sub(r"^#(?=(  )*\w+:)", "", text, flags=re.MULTILINE))
    whole = load_project(file)
    assert whole.run == RunConfig()
    assert whole.deploy.schedule.cron is None
    given = yaml.safe_load(file.read_text())
    for name in STARTER_KEYS:
        values = given
        for part in name.split("."):
            assert part in values, name
            values = values[part]
    assert set(STARTER_KEYS) <= set(known_keys(ProjectConfig))
    sentences = [key.text for section in sections_of(ProjectConfig) for key in section.keys if key.name in STARTER_KEYS]
    plain = " ".join(text.replace("\n# ", " ").split())
    assert all(sentence in plain for sentence in sentences)
    assert all(len(line) <= 104 for line in text.splitlines())


@pytest.mark.parametrize(("channels", "image_size", "width"), [(1, 8, 16), (3, 28, 8), (3, 130, 4)])
def test_the_network_of_a_new_project_gives_logits(channels: int, image_size: int, width: int) -> None:
    spec = importlib.util.spec_from_file_location("my_network", STARTER_NETWORK)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = module.SmallNet(channels=channels, image_size=image_size, classes=5, width=width)
    assert network(torch.randn(2, channels, image_size, image_size)).shape == (2, 5)
    assert network.head.in_features == 4 * width
