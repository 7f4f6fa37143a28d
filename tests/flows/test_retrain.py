"""A retraining trains only for a reason, and reports the reason."""

import hashlib
import time
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
from mlflow.artifacts import load_text
from mlflow.tracking import MlflowClient
from prefect import get_client
from prefect.client.schemas.objects import FlowRun, StateType

from flows.retrain import retrain_flow
from flows.summary import Refused, Summary
from infra.settings import Settings
from infra.storage import bucket_layout
from infra.storage.object_store import ObjectStore
from infra.tracking import mlflow_runs
from infra.tracking.model_registry import RegisteredVersion, create_version, search_versions
from infra.tracking.model_versions import find_version
from infra.tracking.promotion_history import history, newest, promote, rollback
from infra.tracking.tags import WAITING, VersionRecord
from tasks.config.gates import GateConfig
from tasks.config.run import RunConfig
from tasks.data.dataset import DatasetRef, load_manifest
from tasks.release import retrain_decision
from tasks.release.promote import champion_data, promote_version
from tasks.release.quality_gate import judge_version, publish
from tasks.release.retrain_decision import what_changed
from tasks.training.runs.run_record import config_inputs, read_record
from tests.flows.conftest import CONFIG


@pytest.fixture(scope="module")
def first(stack: object, quiet_prefect: None) -> tuple[RunConfig, Summary]:
    """The result of a model's first training, by `retrain`."""
    let_pass = GateConfig(floor=0.0, min_class_recall=0.0)  # two epochs may leave a class unlearnt
    config = CONFIG.model_copy(update={"name": "retrained", "ranks": 1, "epochs": 2, "gate": let_pass})
    return config, retrain_flow(config)


@pytest.mark.long
@pytest.mark.parametrize(
    ("state", "judged"),
    [(StateType.PAUSED, False), (StateType.RUNNING, False), (StateType.CRASHED, True), (None, True)],
)
def test_version_that_another_flow_run_asks_about_is_not_judged_at_the_same_time(
    state: StateType | None, judged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RUNNING: it has just given up the lease, or acts on the answer."""
    tags = VersionRecord(verdict="passed", approval=WAITING).to_tags()
    version = RegisteredVersion(name="m", version="1", run_id="0", created=datetime.now(UTC), description="", tags=tags)
    asking = state and FlowRun(flow_id=uuid4(), state_type=state)
    monkeypatch.setattr(retrain_decision, "search_versions", lambda **_: [version])
    monkeypatch.setattr(retrain_decision, "read_flow_run", lambda _: asking)
    monkeypatch.setattr(retrain_decision, "_inputs_of", lambda *_: {})
    monkeypatch.setattr(mlflow_runs, "run_tags", lambda _: {})
    approved_by_people = CONFIG.model_copy(update={"approval": True})
    decided = retrain_decision._undecided("m", approved_by_people, None, {})
    assert decided is not None
    train, why, judge = decided
    assert not train and why.startswith("version 1, with the same inputs: waiting for a person's decision")
    assert judge == (version if judged else None)
    assert retrain_decision._undecided("m", CONFIG, None, {}) is None


@pytest.mark.long
@pytest.mark.parametrize("key", ["pretrained_sha256", "pretrained_mean", "pretrained_std"])
@pytest.mark.parametrize(
    ("keys", "counts"),
    [({}, True), ({"warm_start": True}, False), ({"warm_start": True, "pretrained": "weights.safetensors"}, True)],
    ids=["fresh", "warm start", "named weights"],
)
def test_weights_to_start_from_are_a_reason_to_retrain_unless_they_are_the_last_champions(
    key: str, keys: dict[str, Any], counts: bool
) -> None:
    config = CONFIG.model_copy(update=keys)
    manifest = {name: "same" for name in retrain_decision.INPUTS}
    inputs = [
        retrain_decision._inputs({**manifest, "config": {"lr": 0.1, key: value}}, config) for value in ("one", "other")
    ]
    assert (inputs[0] != inputs[1]) is counts


@pytest.mark.long
def test_a_key_that_is_newer_than_the_champion_is_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    champion = RegisteredVersion(name="m", version="1", run_id="0", created=datetime.now(UTC), description="", tags={})
    manifest = {**dict.fromkeys(retrain_decision.INPUTS, "same"), "config": {"lr": CONFIG.lr, "epochs": CONFIG.epochs}}
    record = SimpleNamespace(config=CONFIG, manifest=SimpleNamespace(model_dump=lambda: manifest))
    monkeypatch.setattr(retrain_decision, "read_record", lambda run_id: record)
    now = retrain_decision._inputs({**manifest, "config": config_inputs(CONFIG)}, CONFIG)
    assert retrain_decision._inputs_of(champion, CONFIG, now) == now


@pytest.mark.long
def test_a_warm_start_takes_over_the_champions_normalisation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The champion's weights were trained on images normalised like that."""
    champion = RegisteredVersion(name="m", version="1", run_id="0", created=datetime.now(UTC), description="", tags={})
    own = {"pretrained_mean": (0.5,), "pretrained_std": (0.25,)}
    config = CONFIG.model_copy(update=own)
    monkeypatch.setattr(retrain_decision, "read_record", lambda run_id: SimpleNamespace(config=config))
    assert retrain_decision._normalisation_of(champion) == own
    assert CONFIG.model_copy(update=retrain_decision._normalisation_of(champion)).training().pretrained_mean == (0.5,)


def state_of(summary: Summary) -> tuple[str, str | None]:
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(UUID(str(summary.prefect_flow_run_id))).state
    assert state is not None
    assert state.type == (StateType.FAILED if summary.status == "refused" else StateType.COMPLETED)
    return state.name, state.message


@pytest.mark.long
def test_without_a_champion_there_is_a_reason(first: tuple[RunConfig, Summary]) -> None:
    summary = first[1]
    assert (summary.status, summary.reason, summary.champion) == ("done", "there is no champion yet", True)
    assert state_of(summary)[0] == "Completed"


@pytest.mark.long
def test_nothing_new_is_skipped_within_seconds(first: tuple[RunConfig, Summary]) -> None:
    config, before = first
    began = time.monotonic()
    summary = retrain_flow(config.model_copy(update={"ranks": 2}))  # which does not affect the result
    assert time.monotonic() - began < 60  # what it takes is measured elsewhere; a training would take longer
    assert (summary.status, summary.exit_status, summary.mlflow_run_id) == ("unchanged", 0, None)
    assert summary.reason == f"nothing has changed since the champion, version {before.model_version}"
    assert state_of(summary) == ("Skipped", summary.reason)
    assert len(history(ObjectStore.connect(Settings().bucket), "retrained")) == 1


@pytest.mark.long
def test_a_file_that_is_no_image_is_no_reason_to_train(first: tuple[RunConfig, Summary]) -> None:
    """It changes the report of preprocessing, which is part of the dataset version."""
    config, before = first
    store = ObjectStore.connect(Settings().bucket)
    manifest = load_manifest(store, before.dataset_version or "")
    report = manifest.report.model_copy(update={"warnings": ("1 file left out: notes.txt",)})

    def stored(**changes: object) -> DatasetRef:
        content = manifest.model_copy(update={"report": report, **changes}).to_bytes()
        version = hashlib.sha256(content).hexdigest()
        store.put_bytes(bucket_layout.dataset_manifest(version), content)
        return DatasetRef(version=version, name="digits")

    assert what_changed.fn("retrained", config, stored()).why.startswith("nothing has changed since the champion")
    assert what_changed.fn("retrained", config, stored(image_size=9)).why.endswith("version 1: data")


@pytest.mark.slow
def test_what_has_changed_is_named_and_what_was_refused_is_not_tried_again(
    first: tuple[RunConfig, Summary],
) -> None:
    config, before = first
    changed = RunConfig.model_validate(
        config.resolved() | {"epochs": 1, "lr": 1e-6, "gate": {"max_class_drop": 0.0, "min_support": 1}}
    )
    with pytest.raises(Refused) as refusal:
        retrain_flow(changed)
    assert refusal.value.exit_status == 3
    refused = refusal.value.summary
    assert refused.status == "refused"
    assert refused.reason == (
        f"changed since the champion, version {before.model_version}: epochs was 2, is 1; lr was {config.lr}, is 1e-06"
    )
    assert state_of(refused)[0] == "Refused"
    again = retrain_flow(changed)
    assert again.status == "unchanged"
    assert again.reason == (
        f"version {refused.model_version}, with the same inputs, was refused against version {before.model_version}"
    )


@pytest.mark.slow
def test_force_trains_all_the_same_from_the_champion_if_asked(first: tuple[RunConfig, Summary]) -> None:
    config, before = first
    summary = retrain_flow(config.model_copy(update={"warm_start": True, "epochs": 1, "lr": 1e-5}), force=True)
    assert summary.reason is not None and summary.reason.startswith("training was forced; changed: epochs was 2, is 1")
    run = MlflowClient().get_run(summary.mlflow_run_id or "")
    assert run.data.params["pretrained_sha256"] != "None"
    assert summary.accuracy is not None and before.accuracy is not None
    assert summary.accuracy > before.accuracy - 0.05  # fresh weights would know nothing after such an epoch


@pytest.mark.long
def test_cost_is_in_the_run_and_in_the_summary(first: tuple[RunConfig, Summary]) -> None:
    summary = first[1]
    steps = ["download", "preprocess", "decide", "data-gate", "train", "evaluate", "register", "gates"]
    assert list(summary.step_seconds) == steps
    metrics = MlflowClient().get_run(summary.mlflow_run_id or "").data.metrics
    assert metrics["work/train_seconds"] == summary.step_seconds["train"]
    assert 100e6 < metrics["work/peak_memory_bytes"] < 10e9  # a process with torch
    assert metrics["work/rank_hours"] == pytest.approx((summary.train_seconds or 0) / 3600, rel=0.02)


# From here on without training: versions are copies of the first


def copied(first: tuple[RunConfig, Summary], lr: float, to: str = "retrained") -> RegisteredVersion:
    """Registers another version with the first version's files, as a training with another learning rate would."""
    before = first[1]
    name, run_id = before.model_name or "", before.mlflow_run_id or ""
    record = read_record(run_id)
    manifest = record.manifest.model_copy(update={"config": record.manifest.config | {"lr": lr}})
    copy = mlflow_runs.start_run("digits", "copy", {}, {})
    config = record.config.model_copy(update={"lr": lr})
    written = record.model_copy(update={"manifest": manifest, "config": config}).model_dump_json().encode()
    ObjectStore.connect(Settings().bucket).put_bytes(f"runs/{copy}/run.json", written)
    mlflow_runs.log_text(copy, "report/evaluation.json", load_text(f"runs:/{run_id}/report/evaluation.json"))
    mlflow_runs.end_run(copy, "FINISHED")
    (output,) = MlflowClient().get_run(run_id).outputs.model_outputs
    original = MlflowClient().get_model_version(name, before.model_version or "")
    tags = {key: value for key, value in original.tags.items() if not key.startswith("convoy.verdict")}
    return find_version(create_version(to, output.model_id, run_id=copy, tags=tags).address)


@pytest.mark.long
def test_what_other_conditions_refused_is_judged_again_rather_than_trained_again(
    first: tuple[RunConfig, Summary],
) -> None:
    config, before = first
    refused = copied(first, lr=0.5)
    strict = config.model_copy(update={"lr": 0.5, "gate": GateConfig(floor=1.0)})
    publish(refused, judge_version(refused, strict.gate))
    champion = before.model_version
    why = f"version {refused.version}, with the same inputs, was refused against version {champion}"
    skipped = retrain_flow(strict)
    assert (skipped.status, skipped.reason) == ("unchanged", why)
    verdict = judge_version(refused, strict.gate)
    publish(refused, verdict.model_copy(update={"champion_failed": True}))
    decided = what_changed.fn("retrained", strict, DatasetRef(version=before.dataset_version or "", name="digits"))
    assert decided.why == f"{why}, which could not be loaded, so it is judged again"
    assert decided.judge and decided.judge.version == refused.version
    publish(refused, verdict)
    judged = retrain_flow(strict.model_copy(update={"gate": config.gate}))
    assert judged.reason == f"{why} by other conditions than the present ones, so it is judged again"
    assert (judged.status, judged.champion, judged.model_version) == ("done", True, refused.version)
    assert judged.mlflow_run_id == refused.run_id  # of the earlier training
    assert "train" not in judged.step_seconds
    assert find_version("retrained@champion") == find_version(refused.address)


@pytest.mark.long
def test_what_a_training_would_only_repeat_is_not_trained(first: tuple[RunConfig, Summary]) -> None:
    before, store, name = first[1], ObjectStore.connect(Settings().bucket), "retrained"
    dataset = DatasetRef(version=before.dataset_version or "", name="digits")
    config = first[0].model_copy(update={"lr": 0.0625})
    champion = find_version(name).version
    version = copied(first, lr=0.0625)
    publish(version, judge_version(version, config.gate))
    same = f"version {version.version}, with the same inputs,"

    registered = what_changed.fn(name, config.model_copy(update={"promote": False}), dataset)
    to_do = f"`convoy promote {name} {version.version}` makes it champion"
    assert (registered.train, registered.judge) == (False, None)
    assert registered.why == f"{same} passed against version {champion}; {to_do}"
    released = what_changed.fn(name, config, dataset)
    assert (released.train, released.judge and released.judge.version) == (False, version.version)

    promote_version(version)
    rollback(store, name)
    given_up = what_changed.fn(name, config, dataset)
    assert (given_up.train, given_up.judge) == (False, None)
    assert given_up.why == f"{same} was champion until version {champion} was restored; --force trains"
    assert what_changed.fn(name, config, dataset, force=True).train

    first_refused = copied(first, lr=0.0625, to="never-champion")
    strict = config.model_copy(update={"gate": GateConfig(floor=1.0)})
    publish(first_refused, judge_version(first_refused, strict.gate))
    again = what_changed.fn("never-champion", strict, dataset)
    assert (again.train, again.judge) == (False, None)
    assert again.why == "version 1, with the same inputs, was refused when there was no champion either"


@pytest.mark.long
def test_champions_that_the_registry_has_lost_do_not_lock_anyone_out(first: tuple[RunConfig, Summary]) -> None:
    config, before = first
    name, store = "retrained", ObjectStore.connect(Settings().bucket)
    dataset = DatasetRef(version=before.dataset_version or "", name="digits")
    promote(store, copied(first, lr=0.25), after=newest(store, name))
    last = newest(store, name)
    assert last
    for version in search_versions(name=name):
        if version.version != before.model_version:
            MlflowClient().delete_model_version(name, version.version)
    assert champion_data(name).present == before.dataset_version  # the first one takes their place
    assert find_version(name).version == before.model_version
    unchanged = what_changed.fn(name, config, dataset)
    assert unchanged.why == f"nothing has changed since the champion, version {before.model_version}"

    newer = copied(first, lr=0.125)
    MlflowClient().delete_model_version(name, before.model_version or "")
    assert champion_data(name).present is None
    decision = what_changed.fn(name, config, dataset)
    assert decision.train and f"version {last.to_version} of 'retrained'" in decision.why
    verdict = judge_version(newer, config.gate)
    assert verdict.champion is None and any("registry" in note for note in verdict.notes)
    publish(newer, verdict)
    entry = promote_version(newer)
    assert (entry.number, entry.from_version) == (last.number + 1, last.to_version)
    assert find_version(name).version == newer.version
