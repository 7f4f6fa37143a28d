"""Gates through the command line: refusals and their messages, and the commands that change the champion."""

import json
from pathlib import Path
from uuid import UUID

import pytest
from mlflow.tracking import MlflowClient
from prefect import flow, get_client
from prefect.client.schemas.objects import State, StateType

from flows.pipeline import _ended
from flows.summary import Refused, Summary
from infra.storage.object_store import open_bucket
from infra.tracking.model_registry import ModelVersion, aliased, set_alias, tag_version
from infra.tracking.promotion_history import history
from infra.tracking.tags import VersionRecord
from tests.flows.conftest import CONFIG, Convoy
from tests.flows.program import reported
from tests.tasks.registered import register_digits

SMALL = CONFIG.model_copy(update={"epochs": 1, "ranks": 1})


def test_a_refusal_is_final_in_a_flow_with_retries(stack: object, quiet_prefect: None) -> None:
    tries: list[int] = []

    @flow(retries=2, retry_delay_seconds=0)
    def refused() -> Summary | State[Summary]:
        tries.append(1)
        return _ended(Summary(status="refused", error="too weak", exit_status=3))

    with pytest.raises(Refused, match="too weak"):
        refused()
    assert len(tries) == 1


@pytest.mark.long
def test_data_that_a_gate_refuses_are_not_trained_on(convoy: Convoy, stack: object, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    limit = ("--set", "data_gate.class_images=fail", "--set", "data_gate.min_class_images=1000")
    done = convoy(
        "train", "--dataset", "digits", "--limit", "600", "--name", "poor-data", *limit, "--summary", str(out)
    )
    assert done.status == 3
    assert "dataset digits is refused: class_images is 60, limit 1000" in done.stderr
    found = json.loads(out.read_bytes())
    assert (found["status"], found["exit_status"]) == ("refused", 3)
    assert "mlflow_run_id" not in found and "accuracy" not in found
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(UUID(found["prefect_flow_run_id"])).state
    assert state is not None
    assert (state.type, state.name) == (StateType.FAILED, "Refused")
    assert "class_images" in (state.message or "")
    text = reported("convoy.refused.minor", found["prefect_flow_run_id"])  # minor, since it is a trial
    assert text == f"poor-data was refused\n{found['error']}\nflow run: {found['prefect_flow_run_url']}"


@pytest.mark.long
def test_model_that_a_gate_refuses_stays_out_until_it_is_forced(convoy: Convoy, tmp_path: Path) -> None:
    out, config = tmp_path / "out.json", tmp_path / "config.yaml"
    config.write_text(json.dumps(SMALL.model_copy(update={"name": "poor-model"}).resolved()))
    done = convoy("train", "--config", str(config), "--set", "gate.floor=0.999", "--summary", str(out))
    assert done.status == 3
    assert "the quality gate refused: poor-model/1" in done.stderr
    assert "poor-model, version 1: not champion" in done.stdout
    found = json.loads(out.read_bytes())
    assert (found["status"], found["champion"], found["model_version"]) == ("refused", False, "1")
    assert 0 < found["accuracy"] < 0.999 and found["verdict"].startswith("refused: poor-model/1")
    text = reported("convoy.refused.minor", found["prefect_flow_run_id"])
    assert text.startswith(f"poor-model/1 was refused: accuracy {found['accuracy']:.2%}\n{found['error']}\nreport: ")
    run = MlflowClient().get_run(found["mlflow_run_id"])
    assert run.info.status == "FINISHED"  # the training was in order
    assert "quality gate: refused" in run.data.tags["mlflow.note.content"]
    again = convoy("resume", run.info.run_id)
    assert (again.status, again.complaint) == (2, f"run {run.info.run_id} has finished; there is nothing to resume")
    assert run.data.tags["convoy.verdict"] == "refused"
    version = MlflowClient().get_model_version("poor-model", "1")
    assert version.description.startswith(f"{found['accuracy']:.2%} of ") and "; refused: " in version.description
    assert version.tags["convoy.result"] == f"{found['accuracy']:.2%} test accuracy, refused"

    refused = convoy("promote", "poor-model", "1")
    assert refused.status == 3
    assert "poor-model/1 is not promoted: the quality gate refused" in refused.complaint
    assert convoy("promote", "poor-model", "1", "--force").status == 2  # no reason
    assert aliased("poor-model", "champion") is None
    assert convoy("history", "poor-model").stdout.startswith("poor-model has no champion yet")
    (row,) = (line.split() for line in convoy("runs").stdout.splitlines() if found["mlflow_run_id"] in line)
    assert "poor-model/1" in row and row[-2:] == [f"{found['accuracy']:.2%}", "refused"]
    (row,) = (line.split() for line in convoy("models").stdout.splitlines() if line.split()[0] == "poor-model")
    assert row == ["poor-model", "none", "1"]

    judged = convoy("promote", "poor-model", "1", "--judge", "--set", "power=0.9")  # the floor is that of its training
    assert judged.status == 3
    assert "floor" in judged.stdout
    unasked = convoy("promote", "poor-model", "1", "--set", "floor=0", "--force")
    assert (unasked.status, unasked.complaint) == (2, "--force needs a --reason, which is kept in the history")
    forced = convoy("promote", "poor-model", "@challenger", "--force", "--reason", "a test")
    assert forced.status == 0, forced.stderr
    assert "poor-model was promoted to version 1" in forced.stdout
    assert aliased("poor-model", "champion") == ModelVersion(name="poor-model", version="1")
    verdict = MlflowClient().get_model_version("poor-model", "1").tags["convoy.verdict_sha256"]
    itself = convoy("promote", "poor-model", "1", "--judge")
    assert itself.status == 2
    assert "version 1 of 'poor-model' is its champion already" in itself.complaint
    assert MlflowClient().get_model_version("poor-model", "1").tags["convoy.verdict_sha256"] == verdict
    history = convoy("history", "poor-model").stdout
    assert "promote (forced)" in history and "a test" in history
    set_alias(ModelVersion(name="poor-model", version="1"), "previous")
    history = convoy("history", "poor-model").stdout
    assert "alias in MLflow differs: previous: 1 → none; `convoy doctor --fix` repairs it" in history
    assert aliased("poor-model", "previous") is not None  # a command that reads repairs nothing
    back = convoy("rollback", "poor-model")
    assert back.status == 2
    assert "version 1 is the first champion of 'poor-model'" in back.complaint
    compared = convoy("compare", "poor-model/1", "poor-model")
    assert compared.status == 0, compared.stderr
    assert "McNemar exact p = 1" in compared.stdout


@pytest.mark.long
def test_history_shows_the_conditions_that_a_promotion_changed(
    convoy: Convoy, stack: object, quiet_prefect: None, tmp_path: Path
) -> None:
    version = register_digits("loosened", tmp_path).version
    tag_version(version, VersionRecord(serving="passed").to_tags())
    assert convoy("promote", "loosened", "1", "--judge").status == 3  # its weights were never trained
    done = convoy("promote", "loosened", "1", "-s", "floor=0", "-s", "min_class_recall=0")
    assert done.status == 0, done.stderr
    (entry,) = history(open_bucket(), "loosened")
    assert entry.reason == 'judged with {"floor": 0.0, "min_class_recall": 0.0}'


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["promote", "nobody", "1"], "no model is called 'nobody'"),
        (["promote", "nobody", "1", "--set", "no_such_key=3"], "no_such_key"),
        (["rollback", "nobody"], "no model is called 'nobody'"),
        (["history", "nobody"], "no model is called 'nobody'"),
        (["compare", "nobody", "nobody/1"], "no model is called 'nobody'"),
    ],
)
def test_unknown_model_is_named(convoy: Convoy, stack: object, arguments: list[str], hint: str) -> None:
    done = convoy(*arguments)
    assert done.status == 2
    assert hint in done.complaint
