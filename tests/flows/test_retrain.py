"""Retraining only when there is a reason, and what the reasons are."""

import time
from uuid import UUID

import pytest
from mlflow.tracking import MlflowClient
from prefect import get_client
from prefect.client.schemas.objects import StateType

from flows.retrain import retrain_flow
from flows.summary import Summary
from infra.objectstore import ObjectStore
from infra.promotion import history
from infra.settings import Settings
from tasks.config import RunConfig
from tests.flows.conftest import CONFIG


@pytest.fixture(scope="module")
def first(stack: object, quiet_prefect: None) -> tuple[RunConfig, Summary]:
    """A model's first training, by `retrain`."""
    config = CONFIG.model_copy(update={"name": "retrained", "ranks": 1, "epochs": 2})
    return config, retrain_flow(config)


def state_of(summary: Summary) -> tuple[str, str | None]:
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(UUID(str(summary.prefect_flow_run_id))).state
    assert state is not None and state.type == StateType.COMPLETED
    return state.name, state.message


def test_without_a_champion_there_is_a_reason(first: tuple[RunConfig, Summary]) -> None:
    summary = first[1]
    assert (summary.status, summary.reason, summary.champion) == ("done", "there is no champion yet", True)
    assert state_of(summary)[0] == "Completed"


def test_nothing_new_is_skipped_within_seconds(first: tuple[RunConfig, Summary]) -> None:
    config, before = first
    began = time.monotonic()
    summary = retrain_flow(config.model_copy(update={"ranks": 2}))  # which has no say in the result
    assert time.monotonic() - began < 60  # what it takes is measured elsewhere; a training would take longer
    assert (summary.status, summary.exit_status, summary.mlflow_run_id) == ("unchanged", 0, None)
    assert summary.reason == f"nothing has changed since the champion, version {before.model_version}"
    assert state_of(summary) == ("Skipped", summary.reason)
    assert len(history(ObjectStore.connect(Settings().bucket), "retrained")) == 1


@pytest.mark.slow
def test_what_has_changed_is_named_and_what_was_refused_is_not_tried_again(
    first: tuple[RunConfig, Summary],
) -> None:
    config, before = first
    changed = RunConfig.model_validate(
        config.resolved() | {"epochs": 1, "lr": 1e-6, "gate": {"max_class_drop": 0.0, "min_support": 1}}
    )
    refused = retrain_flow(changed)
    assert refused.status == "refused"
    assert refused.reason == (
        f"changed since the champion, version {before.model_version}: epochs was 2, is 1; lr was {config.lr}, is 1e-06"
    )
    assert state_of(refused)[0] == "Refused"
    again = retrain_flow(changed)
    assert again.status == "unchanged"
    assert again.reason == (
        f"version {refused.model_version}, made of the same, was refused for version {before.model_version}"
    )


@pytest.mark.slow
def test_force_trains_all_the_same_from_the_champion_if_asked(first: tuple[RunConfig, Summary]) -> None:
    config, before = first
    summary = retrain_flow(config.model_copy(update={"warm_start": True, "epochs": 1, "lr": 1e-5}), force=True)
    assert summary.reason is not None and summary.reason.startswith("it was asked for; changed: epochs was 2, is 1")
    run = MlflowClient().get_run(summary.mlflow_run_id or "")
    assert run.data.params["pretrained_sha256"] != "None"
    assert summary.accuracy is not None and before.accuracy is not None
    assert summary.accuracy > before.accuracy - 0.05  # fresh weights would know nothing after such an epoch


def test_cost_is_in_the_run_and_in_the_summary(first: tuple[RunConfig, Summary]) -> None:
    summary = first[1]
    steps = ["download", "preprocess", "decide", "data-gate", "train", "evaluate", "register", "gates"]
    assert list(summary.step_seconds) == steps
    metrics = MlflowClient().get_run(summary.mlflow_run_id or "").data.metrics
    assert metrics["cost/train_seconds"] == summary.step_seconds["train"]
    assert 100e6 < metrics["cost/peak_memory_bytes"] < 10e9  # a process with torch
    assert metrics["cost/rank_hours"] == pytest.approx((summary.train_seconds or 0) / 3600, rel=0.02)
