"""Flow runs say model, network and why they run."""

import json
from pathlib import Path
from uuid import UUID

import pytest
from prefect import flow, get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.client.schemas.objects import FlowRun

from flows.deployments import deploy
from flows.run_names import (
    command_reason,
    model_name,
    prediction_name,
    pruning_name,
    reason_of,
    training_name,
    with_name,
)
from infra.sources.find import find_source
from infra.sources.mirrors import Mirrors
from infra.sources.slug import slug
from tasks.config.run import RunConfig
from tests.flows.conftest import Convoy
from tests.flows.program import wait_for
from tests.flows.test_service import written


def name_of(run_id: object) -> str:
    with get_client(sync_client=True) as client:
        return client.read_flow_run(UUID(str(run_id))).name


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"dataset": "digits"}, "digits"),
        ({"dataset": "digits", "name": "Cats"}, "Cats"),
        ({"dataset": "data/My Photos/"}, "my-photos"),
        ({"dataset": "s3://bucket/photos.v2.tar.gz"}, "photos.v2"),
        ({"dataset": "https://host/a/Set.ZIP"}, "set"),
        ({"dataset": "https://host/a/My%20Set.tgz"}, "my-set"),
        ({"dataset": "file:///data/photos"}, "photos"),
        ({"dataset": "data/labels.csv"}, "labels"),
        ({"dataset": "s3://bucket/photos/metadata.csv"}, "photos"),
        ({"dataset": "s3://bucket/metadata.csv"}, "bucket"),
        ({"dataset": "s3://bucket/"}, "bucket"),
    ],
)
def test_the_model_is_named_as_the_training_names_it(config: dict[str, str], name: str) -> None:
    assert model_name(RunConfig.model_validate(config)) == name


def test_the_working_folder_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert model_name(RunConfig(dataset=".")) == model_name(RunConfig(dataset=str(tmp_path))) == slug(tmp_path.name)
    assert model_name(RunConfig(dataset="metadata.csv")) == slug(tmp_path.name)
    sent = with_name(RunConfig(dataset=".")).model_dump(exclude_unset=True)  # to a worker, which works elsewhere
    assert sent == {"dataset": ".", "name": slug(tmp_path.name)}
    assert with_name(RunConfig(dataset="photos")).model_dump(exclude_unset=True) == {"dataset": "photos"}


@pytest.mark.parametrize("source", ["My Photos", "folder.zip", "labels.csv", "labels.v2.tsv", "deep/metadata.csv", "."])
def test_the_source_itself_has_that_name(source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    image = tmp_path / "My Photos" / "a" / "1.png"
    for folder in (image.parent, tmp_path / "folder.zip", tmp_path / "deep"):
        folder.mkdir(parents=True)
    image.write_bytes(b"an image")
    for name, between in (("labels.csv", ","), ("labels.v2.tsv", "\t"), ("deep/metadata.csv", ",")):
        Path(name).write_text(f"path{between}label\n{image}{between}a\n")
    with Mirrors(tmp_path / "partial") as mirrors:
        assert find_source(source, mirrors).name == model_name(RunConfig(dataset=source))


@pytest.mark.parametrize(
    ("ci", "why"), [("", "by hand"), ("false", "by hand"), ("true", "CI"), ("1", "CI"), (None, "by hand")]
)
def test_a_command_was_called_by_a_person_or_by_ci(monkeypatch: pytest.MonkeyPatch, ci: str | None, why: str) -> None:
    monkeypatch.delenv("CI", raising=False) if ci is None else monkeypatch.setenv("CI", ci)
    assert command_reason() == why


@pytest.mark.long
def test_a_run_of_a_command_says_whether_a_person_or_ci_called_it(
    stack: object, quiet_prefect: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    @flow(flow_run_name=training_name)
    def training(config: RunConfig, resume: str | None = None) -> None:
        """Only has the parameters of a training."""

    @flow(flow_run_name=prediction_name)
    def prediction(model: str) -> None: ...

    @flow(flow_run_name=pruning_name)
    def pruning() -> None: ...

    monkeypatch.setenv("CI", "true")
    config = RunConfig(dataset="digits", model="notes")
    names = [
        name_of(state.state_details.flow_run_id)
        for state in (
            training(config, return_state=True),
            training(config, "0123abcd", return_state=True),
            training.with_options(name="trial")(config, return_state=True),
            prediction("cats@champion", return_state=True),
            pruning(return_state=True),
        )
    ]
    assert names == [
        "digits notes (CI)",
        "digits notes (resumed CI)",
        "digits notes (trial, CI)",
        "cats@champion (CI)",
        "storage (CI)",
    ]


@pytest.mark.long
def test_a_run_of_a_deployment_says_what_asked_for_it(
    convoy: Convoy, stack: object, quiet_prefect: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The worker that names it runs elsewhere; for an event see `test_service`."""
    list(deploy(written(tmp_path / "prefect.yaml", name="named", work_pool={"name": "unserved-pool"}, triggers=[])))
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("retrain/named")

    def requested() -> FlowRun:
        done = convoy("retrain", "-d", "named", "--json")
        with get_client(sync_client=True) as client:
            return client.read_flow_run(UUID(json.loads(done.stdout)["prefect_flow_run_id"]))

    def scheduled() -> list[FlowRun]:
        with get_client(sync_client=True) as client:
            of_it = DeploymentFilter(id=DeploymentFilterId(any_=[deployment.id]))
            return [run for run in client.read_flow_runs(deployment_filter=of_it) if run.auto_scheduled]

    monkeypatch.delenv("CI", raising=False)
    by_hand = requested()
    with get_client(sync_client=True) as client:
        by_form = client.create_flow_run_from_deployment(deployment.id)
    monkeypatch.setenv("CI", "true")
    by_ci = requested()
    by_schedule = wait_for(scheduled, "the scheduler")[0]
    assert reason_of(by_ci) == "CI"
    assert reason_of(by_schedule) == "schedule"
    monkeypatch.delenv("CI")
    assert [reason_of(run) for run in (by_hand, by_form, by_ci)] == ["by hand", "by hand", "CI"]
