"""The whole flow on the real stack: its objects in the bucket, its MLflow run and its flow run."""

import hashlib
import json
import math
import re
from collections import Counter
from pathlib import Path
from uuid import UUID

import mlflow
import pytest
import torch
from mlflow.artifacts import load_text
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from prefect import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
)
from prefect.client.schemas.objects import StateType
from safetensors.torch import load

from cnn.config.preprocessing import PreprocessConfig
from cnn.data.manifest import canonical_json
from cnn.networks.weights import weights_sha256
from flows import pipeline
from flows.step_timer import StepTimer
from flows.summary import Summary
from infra.settings import Settings
from infra.storage.object_store import ObjectStore
from infra.tracking.mlflow_runs import run_url
from infra.tracking.promotion_history import history, this_user
from tasks.config.run import RunConfig
from tasks.data.dataset import load_manifest
from tasks.training.checkpoints import commits_of, finished_outcome
from tests.conftest import REPOSITORY
from tests.flows.conftest import CONFIG
from tests.flows.program import reported, wait_for
from tests.flows.requests_made import table


@pytest.fixture(scope="module")
def run(trained: Summary) -> Run:
    assert trained.mlflow_run_id
    return MlflowClient().get_run(trained.mlflow_run_id)


@pytest.fixture(scope="module")
def bucket(trained: Summary) -> ObjectStore:
    return ObjectStore.connect(Settings().bucket, create=False)


@pytest.mark.parametrize(("pretrained", "limit"), [(None, 128), ("weights.safetensors", 224)])
def test_photographs_stay_larger_for_pretrained_networks(
    monkeypatch: pytest.MonkeyPatch, pretrained: str | None, limit: int
) -> None:
    class Preprocessed(Exception):
        pass

    def preprocess(raw: object, config: PreprocessConfig, *, max_default_size: int, refresh: bool) -> None:
        raise Preprocessed(max_default_size)

    monkeypatch.setattr(pipeline, "check_server", lambda: None)
    monkeypatch.setattr(pipeline, "download", lambda dataset, config, *, refresh: None)
    monkeypatch.setattr(pipeline, "preprocess", preprocess)
    config = CONFIG.model_copy(update={"pretrained": pretrained})
    with pytest.raises(Preprocessed) as found:
        pipeline._train_and_release(
            config, frozenset(), None, StepTimer(), only_if_changed=False, force=False, trial=False
        )
    assert found.value.args == (limit,)


def test_servers_are_asked_no_more_than_they_need_to_be(
    trained: Summary, requests_made: Counter[tuple[str, str]]
) -> None:
    """Some of the requests to Prefect depend on time: log lines, progress, and renewals of the lease.

    Those to the bucket are counted as from an empty one; if another test has packed the data before, they are fewer.
    """
    print(table(requests_made))
    for server, most in {"MLflow": 118, "Prefect": 110, "bucket": 85}.items():
        assert sum(count for (each, _), count in requests_made.items() if each == server) <= most, server


def test_every_object_in_the_bucket_has_its_row_in_the_layout(trained: Summary, bucket: ObjectStore) -> None:
    table = (REPOSITORY / "tasks/README.md").read_text().partition("\n## The bucket\n")[2].partition("\n## ")[0]
    layout = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    patterns = [re.sub("<[^>]+>", "[^/]+", key.replace(".", r"\.").replace("**", ".+")) for key in layout]
    tops = {key.partition("/")[0] for key in layout}
    keys = [info.key for info in bucket.list("") if info.key.partition("/")[0] in tops]  # without the user's own
    assert any(str(trained.mlflow_run_id) in key for key in keys)
    assert [key for key in keys if sum(bool(re.fullmatch(pattern, key)) for pattern in patterns) != 1] == []


def test_summary_has_every_name_that_scripts_depend_on(trained: Summary) -> None:
    found = trained.as_dict()
    names = (
        "accuracy weights_sha256 dataset dataset_version model_name model_version world_size train_seconds "
        "rank_hours total_seconds images_per_second mlflow_tracking_uri mlflow_run_id prefect_flow_run_id "
        "checkpoint_prefix"
    )
    assert set(names.split()) <= found.keys()
    assert (found["status"], found["exit_status"]) == ("done", 0)
    assert (found["dataset"], found["model_name"], found["world_size"]) == ("digits", CONFIG.name, 2)
    assert 0.5 < found["accuracy"] <= 1
    assert 0 < found["train_seconds"] < found["total_seconds"]
    assert found["rank_hours"] == pytest.approx(2 * found["train_seconds"] / 3600, abs=1e-5)
    assert found["images_per_second"] > 0


def test_run_is_finished_and_has_every_parameter(trained: Summary, run: Run) -> None:
    assert run.info.status == "FINISHED"
    params = run.data.params
    assert params["network.width"] == "4"
    assert params["epochs"] == str(CONFIG.epochs)
    assert params["dataset"] == "digits"
    assert params["data.limit"] == "600"
    assert params["augment.flip"] == "False"
    assert "ranks" not in params  # it has no say in the result


def test_run_has_metrics_by_step_and_by_epoch(trained: Summary, run: Run) -> None:
    def history(name: str) -> list[tuple[int, float]]:
        points = MlflowClient().get_metric_history(run.info.run_id, name)
        return [(point.step, point.value) for point in points]

    per_epoch = 600 // CONFIG.batch_size
    last = CONFIG.epochs * per_epoch
    assert [step for step, _ in history("val/accuracy")] == list(range(per_epoch, last + 1, per_epoch))
    assert history("epoch") == [(epoch * per_epoch, epoch) for epoch in range(1, CONFIG.epochs + 1)]
    losses = history("train/loss")
    assert losses[-1][0] == last
    assert losses[-1][1] < losses[0][1]
    for name in ("train/accuracy", "train/learning_rate", "train/images_per_second", "val/loss"):
        assert all(math.isfinite(value) and value > 0 for _, value in history(name))
    assert run.data.metrics["test/accuracy"] == trained.accuracy


def test_run_is_tagged_with_where_it_comes_from(trained: Summary, run: Run) -> None:
    tags = run.data.tags
    assert tags["prefect.flow_run_id"] == trained.prefect_flow_run_id
    assert tags["prefect.flow_run_url"] == trained.prefect_flow_run_url
    assert tags["mlflow.source.name"] == "convoy train"
    assert tags["mlflow.user"] == this_user()
    assert tags["convoy.model_version"] == f"{trained.model_name}/{trained.model_version}"
    assert tags["convoy.verdict"] == "passed"
    assert tags["convoy.result"] == f"{trained.accuracy:.2%} test accuracy, passed"
    assert tags["convoy.checkpoint_prefix"] == trained.checkpoint_prefix
    assert tags["convoy.dataset_version"] == trained.dataset_version
    assert all(len(tags[f"convoy.{name}"]) == 64 for name in ("code_digest", "manifest_digest", "lock_sha256"))


def test_run_names_the_dataset_version_it_used(trained: Summary, run: Run) -> None:
    assert run.inputs is not None
    (used,) = run.inputs.dataset_inputs
    assert used.dataset.name == "digits"
    assert {tag.key: tag.value for tag in used.tags}["convoy.digest"] == trained.dataset_version
    assert trained.dataset_version
    manifest = load_manifest(ObjectStore.connect(Settings().bucket), trained.dataset_version)
    assert manifest.splits["train"].count == 600


def test_run_has_the_report_and_a_manifest_whose_digest_names_the_training(trained: Summary, run: Run) -> None:
    uri = f"runs:/{run.info.run_id}"
    client = MlflowClient()
    names = {item.path for folder in ("", "report") for item in client.list_artifacts(run.info.run_id, folder)}
    pictures = ("confusion_matrix", "reliability", "gallery", "data_samples")
    pages = ("data", "evaluation", "serving", "verdict")
    reports = {*(f"{name}.png" for name in pictures), *(f"{name}.{kind}" for name in pages for kind in ("md", "json"))}
    assert {f"report/{name}" for name in reports | {"confusion_matrix.json", "index.html"}} | {"manifest.json"} <= names
    # The configuration changes no image, and 8×8 pixels leave no useful map.
    assert not {"report/augmented.png", "report/grad_cam.png"} & names
    assert json.loads(load_text(f"{uri}/report/evaluation.json"))["accuracy"] == trained.accuracy
    manifest = json.loads(load_text(f"{uri}/manifest.json"))
    assert manifest["dataset_version"] == trained.dataset_version
    assert manifest["config"]["batch_size"] == CONFIG.batch_size
    digest = hashlib.sha256(canonical_json(manifest)).hexdigest()
    assert run.data.tags["convoy.manifest_digest"] == digest


def test_page_and_description_say_what_a_reviewer_wants_to_know(trained: Summary, run: Run) -> None:
    page = load_text(f"runs:/{run.info.run_id}/report/index.html")
    assert [page.index(f"<h2>{heading}</h2>") for heading in ("Verdict", "Evaluation", "Serving", "Data")]
    assert page.count("data:image/webp;base64,") == 4
    assert "what the network got in their place" not in page and "Grad-CAM" not in page
    assert "<script" not in page and "http:" not in page and "https:" not in page
    note = run.data.tags["mlflow.note.content"]
    assert note.startswith(f"{trained.accuracy:.2%} of ") and "; passed: " in note.partition("\n")[0]
    for told in (f"{trained.model_name}/{trained.model_version}", "quality gate: passed", "serving gate: passed"):
        assert told in note


def test_version_that_passed_is_released_with_its_verdict(trained: Summary, bucket: ObjectStore) -> None:
    (first, *_) = history(bucket, trained.model_name or "")
    assert (first.to_version, first.forced, first.verdict_summary) == (trained.model_version, False, trained.verdict)
    assert trained.champion is True


def test_promotion_is_reported_to_prefect_with_accuracy_and_report(trained: Summary) -> None:
    text = reported("convoy.promoted", str(trained.prefect_flow_run_id))
    assert text == trained.message
    assert text.splitlines() == [
        f"{CONFIG.name}/{trained.model_version} was promoted to champion: accuracy {trained.accuracy:.2%}",
        f"the quality gate {trained.verdict}",
        f"report: {run_url(trained.mlflow_run_id or '', 'artifacts/report/index.html')}",
        f"flow run: {trained.prefect_flow_run_url}",
    ]


def test_checkpoints_lie_committed_under_their_prefix(trained: Summary, run: Run, bucket: ObjectStore) -> None:
    assert trained.checkpoint_prefix
    commits = list(commits_of(bucket, run.info.run_id))
    prefix = trained.checkpoint_prefix.removeprefix(bucket.uri(""))
    keys = {info.key for info in bucket.list(prefix)}
    assert keys == {key for commit in commits for key in (*commit.files, f"{prefix}step-{commit.step:08d}/commit.json")}
    assert 1 <= len(commits) <= CONFIG.checkpoints.keep + 1
    assert commits[0].step <= CONFIG.epochs * (600 // CONFIG.batch_size)
    for commit in commits:
        assert commit.manifest_digest == run.data.tags["convoy.manifest_digest"]
        for key, sha256 in commit.files.items():
            assert hashlib.sha256(bucket.get_bytes(key)).hexdigest() == sha256


def test_weights_are_committed_once_the_training_has_finished(trained: Summary, run: Run, bucket: ObjectStore) -> None:
    outcome = finished_outcome(bucket, run.info.run_id)
    assert outcome
    assert outcome.steps == CONFIG.epochs * (600 // CONFIG.batch_size)
    assert weights_sha256(load(bucket.get_bytes(outcome.weights_key))) == outcome.weights_sha256
    assert outcome.weights_sha256 == trained.weights_sha256


def test_run_has_the_weights_as_safetensors(trained: Summary, run: Run, tmp_path: Path) -> None:
    file = MlflowClient().download_artifacts(run.info.run_id, "weights/model.safetensors", str(tmp_path))
    assert weights_sha256(load(Path(file).read_bytes())) == trained.weights_sha256
    assert run.data.tags["convoy.weights_sha256"] == trained.weights_sha256


def test_registered_version_is_the_champion_and_predicts_from_raw_images(trained: Summary) -> None:
    assert trained.model_name and trained.model_version
    version = MlflowClient().get_model_version(trained.model_name, trained.model_version)
    assert version.run_id == trained.mlflow_run_id
    assert version.tags["convoy.weights_sha256"] == trained.weights_sha256
    assert version.tags["convoy.serving"] == "passed"
    images = torch.randint(256, (3, 1, 8, 8), dtype=torch.uint8).numpy()
    model = mlflow.pyfunc.load_model(f"models:/{trained.model_name}@champion")
    probabilities = model.predict(images)
    assert probabilities.shape == (3, 10)
    assert probabilities.sum(1) == pytest.approx([1, 1, 1], abs=1e-5)


def test_flow_run_is_completed_with_its_tasks_and_artifacts(trained: Summary) -> None:
    flow_run_id = UUID(trained.prefect_flow_run_id)
    only_ours = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
    names = {
        *("download", "preprocess", "data-gate", "train", "evaluate", "publish-evaluation", "register", "model-card"),
        *("serving-gate", "quality-gate", "release", "report-page"),
    }
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(flow_run_id).state
        assert state is not None
        assert state.type == StateType.COMPLETED

        def ended_tasks() -> dict[str, StateType]:
            tasks = client.read_task_runs(flow_run_filter=only_ours)
            return {
                task.name.rpartition("-")[0]: task.state.type for task in tasks if task.state and task.state.is_final()
            }

        # Prefect records task runs from events, some time after they ended.
        wait_for(lambda: len(ended_tasks()) >= len(names), "Prefect to record the task runs")
        states = ended_tasks()
        artifacts = client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
        )
    assert states == dict.fromkeys(names, StateType.COMPLETED)
    kinds = {artifact.key: artifact.type for artifact in artifacts}
    assert kinds["training"] == "progress"
    for key in ("data-gate", "evaluation", "serving-gate", "quality-gate"):
        assert kinds[key] == "markdown"
    assert kinds["result"] == "table"
    assert next(artifact.data for artifact in artifacts if artifact.key == "training") == 100


def test_configuration_of_the_run_reads_back(trained: Summary) -> None:
    assert RunConfig.model_validate(CONFIG.resolved()) == CONFIG
