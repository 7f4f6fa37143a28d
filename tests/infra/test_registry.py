"""The model registry of a real MLflow server."""

import mlflow
import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient

from infra.errors import ServiceError, UsageError
from infra.tracking import mlflow_runs
from infra.tracking.model_registry import (
    ModelVersion,
    aliased,
    check_model_name,
    create_version,
    log_model,
    search_versions,
    set_alias,
    tag_version,
    version_of,
)
from infra.tracking.model_versions import find_version

IMAGES = np.arange(2 * 1 * 2 * 2, dtype=np.uint8).reshape(2, 1, 2, 2)


class Classifier(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().flatten(1).softmax(1)


@pytest.fixture(scope="module")
def stored(stack: object) -> tuple[str, str]:
    """Creates a run and stores a model with it."""
    run_id = mlflow_runs.start_run("registry-tests", "run", {"lr": 0.1}, {})
    outputs = Classifier()(torch.from_numpy(IMAGES)).numpy()
    model_id = log_model(
        run_id,
        Classifier().eval(),
        images=IMAGES,
        outputs=outputs,
        requirements=["torch"],
        metadata={"classes": ["a", "b", "c", "d"]},
    )
    return run_id, model_id


def test_stored_model_is_ready_but_not_registered(stored: tuple[str, str]) -> None:
    run_id, model_id = stored
    model = MlflowClient().get_logged_model(model_id)
    assert (model.status, model.source_run_id, model.params) == ("READY", run_id, {"lr": "0.1"})
    assert not MlflowClient().search_model_versions(f"run_id = '{run_id}'")


def test_without_room_for_it_nothing_is_stored(stored: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    run_id, model_id = stored
    monkeypatch.setattr("infra.tracking.model_registry.EXTRA_MODEL_BYTES", 1 << 60)
    with pytest.raises(ServiceError, match=r"no space left on the disk for .*: the model temporarily needs 0 bytes"):
        log_model(run_id, Classifier().eval(), images=IMAGES, outputs=IMAGES, requirements=[], metadata={})
    found = MlflowClient().search_logged_models([MlflowClient().get_run(run_id).info.experiment_id])
    assert [model.model_id for model in found] == [model_id]


def test_versions_count_up_and_load(stored: tuple[str, str]) -> None:
    run_id, model_id = stored
    first = create_version("counting up", model_id, run_id=run_id, tags={"a": "1"})
    second = create_version("counting up", model_id, run_id=run_id, tags={})
    assert (first.version, second.version) == ("1", "2")
    assert first.uri == "models:/counting up/1"
    assert first.url == f"{mlflow.get_tracking_uri()}/#/models/counting%20up/versions/1?workflowType=machine_learning"
    loaded = mlflow.pyfunc.load_model(first.uri)
    for count in (1, 2):
        assert np.allclose(loaded.predict(IMAGES[:count]), mlflow.pyfunc.load_model(second.uri).predict(IMAGES)[:count])


def test_alias_moves_and_tags_change(stored: tuple[str, str]) -> None:
    run_id, model_id = stored
    first, second = (create_version("aliases", model_id, run_id=run_id, tags={"a": "1"}) for _ in range(2))
    assert aliased("aliases", "challenger") is None
    for version in (first, second):
        set_alias(version, "challenger")
        assert aliased("aliases", "challenger") == version
    tag_version(first, {"a": "2", "b": "3"})
    assert MlflowClient().get_model_version("aliases", "1").tags == {"a": "2", "b": "3"}


def test_unknown_model_has_no_alias(stack: object) -> None:
    assert aliased("no such model", "challenger") is None


def test_missing_version_cannot_be_tagged(stack: object) -> None:
    with pytest.raises(ServiceError, match="refused to tag version 7 of model 'no such model'") as failure:
        tag_version(ModelVersion(name="no such model", version="7"), {"a": "1"})
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("name", ["bob's cats", 'say "hi"', "a`b; -- c", "100% \\ of", "'", "naïve 花", "run_id = 'x"])
def test_whatever_a_model_may_be_called_it_is_found_again(stored: tuple[str, str], name: str) -> None:
    run_id, model_id = stored
    version = create_version(check_model_name(name), model_id, run_id=run_id, tags={})
    set_alias(version, "champion")
    assert version_of(name, run_id) == version
    assert version_of(name, "another run") is None
    assert [each.address for each in search_versions(name=name)] == [version.address]
    assert find_version(name).address == find_version(version.address).address == version.address
    with pytest.raises(UsageError, match="versions: 1 to 1"):
        find_version(f"{name}/2")


def test_a_tag_of_any_text_is_found_again(stack: object) -> None:
    run_id = mlflow_runs.start_run("registry-tests", "run", {}, {"convoy.model": "bob's cats"})
    assert [run.run_id for run in mlflow_runs.search_runs("convoy.model", "bob's cats", limit=2)] == [run_id]


@pytest.mark.parametrize("name", ["", " ", "a/b", "a:b", "a\nb", "a\\", 'it\'s "so"', "..", "x" * 257])
def test_names_that_mlflow_refuses_are_refused_before(name: str) -> None:
    with pytest.raises(UsageError, match="cannot name a model"):
        check_model_name(name)
